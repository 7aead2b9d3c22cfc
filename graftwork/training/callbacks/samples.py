"""Answers on the way: what the model says to a few validation rows before, while and after it learns."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import BaseModel

from graftwork.atomic import atomic_write_text
from graftwork.batch import Questions
from graftwork.data.preview import Preview
from graftwork.errors import CheckpointError, ConfigError
from graftwork.jsonfile import validated
from graftwork.models.base import Model
from graftwork.parallel.collective import agreed
from graftwork.training.callbacks.progress import tell
from graftwork.training.trainee import data_of

MOST_MOMENTS = 50
"""Longer runs keep the first moment and the last ones, so that a training state never grows with the run."""
SHOWN = 70
"""Characters of a text on the screen."""


@runtime_checkable
class Previewed(Protocol):
    """Data that can give some of their rows as questions."""

    has_validation: bool

    def preview(self, split: str, count: int) -> Preview:
        """Return ``count`` rows of ``split``, the same on every rank."""
        ...


class Shown(NamedTuple):
    """One answer: after how many steps, the prompt as the model reads it, what it says and what is right."""

    step: int
    input: str
    output: str
    expected: str


class _Saved(BaseModel):
    shown: list[tuple[int, str, str, str]]


class Samples(Callback):
    """Lets the model answer a few validation rows, greedily, before the first step and after every validation.

    They are shown beside the validation loss and written to ``samples.jsonl`` of the run directory. Data without
    validation rows, or of another kind than graftwork's, have none. Nothing random is drawn.

    Args:
        count: Rows, taken evenly over the validation rows; 0 for none.
        max_new_tokens: Longest answer.
    """

    def __init__(self, count: int = 3, max_new_tokens: int = 48) -> None:
        for name, value, least in (("count", count, 0), ("max_new_tokens", max_new_tokens, 1)):
            if value < least:
                raise ConfigError(f"Samples({name}={value}) must be at least {least}.")
        self.count, self.max_new_tokens = count, max_new_tokens
        self.shown: list[Shown] = []
        self._preview: Preview | None = None

    def state_dict(self) -> dict[str, object]:
        """Keep what was said."""
        return {"shown": [tuple(one) for one in self.shown]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was said."""
        saved = validated(state_dict, _Saved, "the samples of the training state", CheckpointError)
        self.shown = [Shown(*one) for one in saved.shown]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the untrained model, unless a resumed run has done so."""
        data = data_of(trainer)
        if self.count and trainer.enable_validation and isinstance(data, Previewed) and data.has_validation:
            self._preview = _that_fit(agreed(lambda: data.preview("validation", self.count)), pl_module)
        if not self.shown:
            self._ask(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model as it is now."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            for one in self._ask(trainer, pl_module):
                tell(trainer, f"  {_short(one.input)} -> {_short(one.output)} (right: {_short(one.expected)})")

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> list[Shown]:
        if self._preview is None or not self._preview.questions.prompts:
            return []
        asked, model = self._preview.questions, cast(Model, pl_module)
        end = self._preview.tokenizer.eos_token_id
        tokens = model.generate(
            asked.prompts,
            max_new_tokens=min(self.max_new_tokens, _room(asked, model)),
            stop_ids=[] if end is None else [end],
            adapter=[sorted(model.adapters if way is None else way) for way in asked.ways],
        )
        rows = zip(asked.inputs, self._preview.read(tokens), asked.outputs)
        now = [Shown(trainer.global_step, put, said, right or "") for put, said, right in rows]
        self.shown = _bounded([*self.shown, *now])
        agreed(lambda: self._write(Path(trainer.default_root_dir)) if trainer.is_global_zero else None)
        return now

    def _write(self, root: Path) -> None:
        lines = (json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in self.shown)
        atomic_write_text(root.resolve() / "samples.jsonl", "".join(lines))


def _that_fit(preview: Preview, pl_module: LightningModule) -> Preview:
    """Leave out rows that fill the model's context: there is no room for an answer."""
    model, asked = cast(Model, pl_module), preview.questions
    fit = [number for number in range(len(asked.prompts)) if _room(asked.chosen([number]), model) > 0]
    return Preview(asked.chosen(fit), preview.tokenizer)


def _room(asked: Questions, model: Model) -> int:
    """Return how many tokens every answer may have; an encoder's prompts take nothing from a decoder's."""
    taken = 0 if model.seq2seq else max(map(len, asked.prompts))
    return model.shape.max_position_embeddings - taken


def _bounded(shown: list[Shown]) -> list[Shown]:
    moments = sorted({one.step for one in shown})
    kept = {*moments[:1], *moments[1:][-(MOST_MOMENTS - 1) :]}
    return [one for one in shown if one.step in kept]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else f"{line[: SHOWN // 2]} … {line[-SHOWN // 2 :]}")
