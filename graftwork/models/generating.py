"""Generation as methods of a model: ``model.generate`` and what ``trainer.predict`` calls."""

import logging
from collections.abc import Sequence
from typing import Any

from graftwork import parallel
from graftwork.errors import ParallelismError
from graftwork.models.adaptable import Adaptable
from graftwork.models.generation import decoding

log = logging.getLogger(__name__)


class Generating(Adaptable):
    """A model that answers prompts; ``generation`` holds the options of ``generate`` that ``trainer.predict`` uses."""

    def __init__(self) -> None:
        super().__init__()
        self.generation: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that reads prompts and writes answers."""
        raise TypeError(f"{type(self).__name__} must have a tokenizer.")

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **options: Any) -> list[list[int]]:
        """Return the tokens that follow each prompt of ids; options as in ``generation.decoding.generate``."""
        return decoding.generate(self, prompts, max_new_tokens, **options)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        """Warn when the data put their rows to the model in another way than its adapters were trained with."""
        theirs = getattr(self.trainer.datamodule, "prompt_format", {})  # type: ignore[attr-defined]
        for name, trained in self._stack.prompt_formats.items() if self._stack else ():
            for key in sorted(theirs.keys() & trained.keys()):
                if theirs[key] != trained[key]:
                    log.warning("%s is %r, but adapter %r was trained with %r.", key, theirs[key], name, trained[key])

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> list[dict[str, Any]]:
        """Answer a predict batch: per prompt ``input``, ``output`` and, where it is known, ``expected``."""
        if parallel.ep_size() > 1 and parallel.dp_size() > 1:
            raise ParallelismError(
                "prediction gives every data-parallel rank its own prompts, but experts are spread over those ranks; "
                "predict with expert_model_parallel_size=1."
            )
        return self.answer_batch(batch, **self.generation)

    def answer_batch(self, batch: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        """Return ``input``, ``output`` and, where known, ``expected`` per prompt; options as in ``generate``."""
        answers = self.generate(batch["prompts"], **options)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        known = batch.get("outputs") or [None] * len(texts)
        return [
            {"input": asked, "output": text.strip(), **({} if right is None else {"expected": right})}
            for asked, text, right in zip(batch["inputs"], texts, known, strict=True)
        ]
