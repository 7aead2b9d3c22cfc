"""Supervised fine-tuning data as a LightningDataModule: files in, step batches out."""

from typing import Optional, Union

import lightning.pytorch as pl
import numpy

from graftwork.batch import Batch, Questions
from graftwork.data.blend import blended, check_weights
from graftwork.data.cache import Report, cache_root
from graftwork.data.collate import Collator, PairCollator
from graftwork.data.encoded import share
from graftwork.data.encoder import NO_CHAT, TOO_LONG, PromptFormat, RowEncoder, RowFormat, check_kind
from graftwork.data.loader import ListLoader, QuestionBuilder, StepBuilder, TrainLoader
from graftwork.data.packing import best_fit_decreasing, efficiency
from graftwork.data.place import Place
from graftwork.data.preview import Preview
from graftwork.data.row_layout import CONVERSATIONS, check_row_layout, layout_of
from graftwork.data.rows import LearnedRows, asked_rows, check_adapters, learned_rows
from graftwork.data.sampler import RowStream, check_position, in_order
from graftwork.data.source import Source, check_source, content_hashes, files_of, named, parts, read_source, title
from graftwork.data.surroundings import Surroundings, Topology
from graftwork.data.telling import tell
from graftwork.data.template import check_templates
from graftwork.data.tokenizer import Tokenizer, check_ids, fingerprint
from graftwork.errors import ConfigError, DataError, suggest
from graftwork.layout import check_deal, check_packed_length
from graftwork.virtual_tokens import PromptLayout


class SFTDataModule(pl.LightningDataModule):
    """Rows of files or directories, answer-only loss, padded or packed.

    Raises ConfigError, ParallelismError on settings, DataError on files and rows.

    Args:
        train: A file, a directory, or a list of several.
        validation: The same; its loss is told at each validation.
        test: The same, for ``trainer.test``.
        predict: The same, for ``trainer.predict``.
        tokenizer: A directory; default the model's own.
        seq_length: Tokens per row, virtual ones included; longer prompts lose tokens on the left.
        micro_batch_size: Rows that go through the model at once.
        global_batch_size: Rows (packed rows with ``packing``) per optimizer step, over all devices.
        packing: Lay several samples side by side in rows of ``seq_length`` tokens.
        prompt_template: A text with fields in braces, or one per task (graftwork.data.template).
        answer_template: It follows the prompt and is tokenised on its own.
        add_bos: Put the first token in front; default as the tokenizer itself does.
        add_eos: Let the answer end with the end token.
        validation_fraction: Share of ``train`` held out, chosen by each row's content, when there is no ``validation``.
        too_long: ``error`` or ``drop`` for answers that do not fit.
        seed: Decides the order of rows.
        num_workers: Processes that build batches; 0 is this one.
        cache_dir: Where tokenised rows are kept; default the user's cache.
        answer_length: Tokens per answer of a sequence-to-sequence model, whose prompts alone ``seq_length`` limits.
        row_layout: The name of the layout that rows have; default what their columns tell.
        train_weights: The share that each of several files has of an epoch's rows, as whole numbers.
    """

    allow_zero_length_dataloader_with_multiple_devices = True  # prediction on fewer rows than devices

    def __init__(
        self,
        train: Union[list[str], str, None] = None,
        validation: Union[list[str], str, None] = None,
        test: Union[list[str], str, None] = None,
        predict: Union[list[str], str, None] = None,
        tokenizer: Optional[str] = None,
        seq_length: int = 1024,
        micro_batch_size: int = 1,
        global_batch_size: int = 8,
        packing: bool = False,
        prompt_template: Union[dict[str, str], str] = "{input}",
        answer_template: Union[dict[str, str], str] = " {output}",
        add_bos: Optional[bool] = None,
        add_eos: bool = True,
        validation_fraction: float = 0.0,
        too_long: str = "error",
        seed: int = 1234,
        num_workers: int = 0,
        cache_dir: Optional[str] = None,
        answer_length: Optional[int] = None,
        row_layout: Optional[str] = None,
        train_weights: Optional[list[int]] = None,
    ) -> None:
        super().__init__()
        self.files: dict[str, Optional[Source]]
        self.files = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.seq_length, self.answer_length = seq_length, answer_length
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.packing = packing
        self.validation_fraction, self.seed = validation_fraction, seed
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self.row_layout, self.train_weights = row_layout, train_weights
        self.report: dict[str, Report] = {}  # per split: what became of its rows
        self._format = RowFormat(
            prompt_template=prompt_template, answer_template=answer_template, add_bos=add_bos, add_eos=add_eos,
            seq_length=seq_length, answer_length=answer_length, too_long=too_long,
        )  # fmt: skip
        self._surroundings = Surroundings(tokenizer)
        self._rows: dict[str, LearnedRows] = {}
        self._stream: RowStream | None = None
        self._resume: dict[str, int] | None = None
        self._other_rows = False
        check_templates(prompt_template, answer_template)
        self._check_settings(too_long)

    def attach(
        self,
        tokenizer: Optional[Tokenizer] = None,
        prompt_layout: Optional[PromptLayout] = None,
        rank: int = 0,
        world_size: int = 1,
        pad_to_multiple: int = 1,
        decoder_start: Optional[int] = None,
    ) -> "SFTDataModule":
        """Give by hand what a trainer would; it wins over the trainer's. Returns the data module itself.

        ``decoder_start``: what the decoder of a sequence-to-sequence model reads first; None: as the trainer's model.
        """
        self._surroundings.attached_tokenizer = tokenizer
        self._surroundings.attached_layout = prompt_layout
        self._surroundings.attached_topology = Topology(rank, world_size, pad_to_multiple)
        self._surroundings.attached_start = decoder_start
        return self

    def setup(self, stage: Optional[str] = None) -> None:
        """Check that the files are there (on every rank, before the model is built)."""
        for path in self.files.values():
            if path is not None:
                check_source(path)
        if self._around().kind_is_known:
            self._check_kind()
        if stage == "fit":
            self._stream = None  # a second fit starts at the first row, unless a state is loaded

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation set."""
        return self.files["validation"] is not None or self.validation_fraction > 0

    @property
    def sizes(self) -> dict[str, int]:
        """Number of rows by split, of the splits that have been read."""
        return {split: len(rows) for split, rows in self._rows.items()}

    @property
    def prompt_format(self) -> PromptFormat:
        """How rows become tokens: what generation and evaluation must repeat (it travels with the adapter)."""
        ours = self._format
        return PromptFormat(
            prompt_template=ours["prompt_template"], answer_template=ours["answer_template"],
            add_bos=ours["add_bos"], add_eos=ours["add_eos"],
        )  # fmt: skip

    @property
    def tokenizer_path(self) -> str | None:
        """Where the tokenizer is that wins over the model's own; None: the model's."""
        return self._surroundings.path

    @property
    def encoder(self) -> RowEncoder:
        """Encodes rows as this data module does, for the adapters attached now."""
        around = self._around()
        return RowEncoder(around.tokenizer, around.layout, seq2seq=around.decoder_start is not None, **self._format)

    def encoder_for(self, tokenizer: Tokenizer | None, layout: PromptLayout, seq2seq: bool = False) -> RowEncoder:
        """Encodes rows as this data module does, for a model with this tokenizer (its own path wins) and layout.

        ``tokenizer`` None: the path alone.
        """
        return RowEncoder(self._surroundings.beside(tokenizer), layout, seq2seq=seq2seq, **self._format)

    def train_dataloader(self) -> TrainLoader:
        """Endless shuffled steps; see RowStream."""
        build = self._builder("train")
        if self._stream is None:
            overfit = bool(getattr(self.trainer, "overfit_batches", 0))
            self._stream = RowStream(len(build), self.global_batch_size, self.seed, overfit)
            if self._resume is not None:
                self._stream.load_state_dict(self._resume)
                self._resume = None
        return TrainLoader(self._stream, build, self.num_workers)

    def val_dataloader(self) -> ListLoader[Batch] | list[ListLoader[Batch]]:
        """Every validation row once; an empty list where there is no validation set."""
        return self._evaluation("validation") if self.has_validation else []

    def test_dataloader(self) -> ListLoader[Batch]:
        """Every test row once."""
        return self._evaluation("test")

    def predict_dataloader(self) -> ListLoader[Questions]:
        """Prompts of the predict, test or validation rows: the first of these that there are."""
        if self.files["predict"] is None and self.files["test"] is None and not self.has_validation:
            raise DataError("nothing to predict: give the data module a 'predict', 'test' or 'validation' file.")
        return self.questions(next(s for s in ("predict", "test", "validation") if self.files[s] or s == "validation"))

    def questions(self, split: str) -> ListLoader[Questions]:
        """This rank's prompts of ``split``, ``micro_batch_size`` a batch; right answers where the file has them."""
        path = self._source(split)
        table = asked_rows(path, self.encoder, cache_root(self.cache_dir), self.row_layout)
        place = self._around().topology
        mine = self._share_of(split, table.data.column("share").to_numpy())[place.rank :: place.world_size].tolist()
        size = self.micro_batch_size
        return ListLoader(QuestionBuilder(table), [mine[i : i + size] for i in range(0, len(mine), size)])

    def preview(self, split: str, count: int) -> Preview:
        """``count`` rows of ``split`` as questions, evenly over its rows; the same on every rank."""
        rows = self._rows[split] if split in self._rows else self._learned(split)
        return Preview.of(rows, count, self._around().tokenizer)

    def raw_rows(self, split: str) -> list[tuple[Place, object]]:
        """The rows of ``split`` as they stand in their files, each with its place."""
        placed = list(read_source(self._source(split), self.row_layout))
        return [placed[i] for i in self._share_of(split, numpy.array([share(raw) for _, raw in placed]))]

    def where(self, rows: list[int], split: str = "train") -> list[str]:
        """Name dataset rows (a batch's ``rows``) by file and line; fills (-1) are left out."""
        learned = self._rows[split] if split in self._rows else self._learned(split)
        return [str(learned.place_of(row)) for row in rows if row >= 0]

    def state_dict(self) -> dict[str, int]:
        """Position in the training data."""
        return self._stream.state_dict() if self._stream is not None else self._resume or {}

    def decides(self) -> dict[str, object]:
        """What decides the training rows and their order, by option: files and tokenizer by their contents."""
        options = ("seq_length", "global_batch_size", "packing", "validation_fraction")
        return {
            "train": content_hashes(self.files["train"]),
            "tokenizer": fingerprint(self._around().tokenizer),
            **{name: getattr(self, name) for name in (*options, "seed")},
            **{name: value for name, value in self._format.items() if name not in options},
            **{n: getattr(self, n) for n in ("row_layout", "train_weights") if getattr(self, n) is not None},
        }

    def around(self) -> dict[str, object]:
        """What a run may differ in without training otherwise, by option."""
        return {
            "train (path)": self.files["train"],
            "validation": content_hashes(self.files["validation"]),
            "micro_batch_size": self.micro_batch_size,
            "num_workers": self.num_workers,
        }

    def accept_other_rows(self) -> None:
        """Go on at a position that was saved on other rows or in another order, which was asked for."""
        self._other_rows = True

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on at a saved position, now or once the training data are built."""
        check_position(state_dict)
        if self._other_rows:
            state_dict = {key: value for key, value in state_dict.items() if key == "consumed_samples"}
        if self._stream is not None:
            self._stream.load_state_dict(state_dict)
        else:
            self._resume = dict(state_dict)

    def _around(self) -> Surroundings:
        self._surroundings.trainer = self.trainer
        return self._surroundings

    def _evaluation(self, split: str) -> ListLoader[Batch]:
        build = self._builder(split)
        plans = in_order(len(build), self.global_batch_size, self.micro_batch_size * build.place.world_size)
        return ListLoader(build, plans, self.num_workers)

    def _builder(self, split: str) -> StepBuilder:
        place = self._around().topology
        check_deal(self.global_batch_size, self.micro_batch_size, place.world_size)
        self._check_kind()
        rows = self._learned(split)
        bins = self._bins(split, rows, place.multiple) if self.packing else None
        return StepBuilder(rows, bins, self._collator(), self.seq_length, place)

    def _collator(self) -> Collator | PairCollator:
        start = self._around().decoder_start
        if start is not None:
            return PairCollator(start, self.micro_batch_size)
        return Collator(self.encoder.text.pad, self.micro_batch_size, self.packing)

    def _check_kind(self) -> None:
        """Raise ConfigError, DataError for options and rows that the kind of model has no use for."""
        seq2seq = self._around().decoder_start is not None
        check_kind(seq2seq, self.answer_length, self._format["add_bos"])
        if not seq2seq:
            return
        if self.packing:
            raise ConfigError("packing=True is not for sequence-to-sequence models; set packing=False.")
        for source in self.files.values():
            if source is None:
                continue
            place, row = next(read_source(source))  # the others are told when they are tokenised
            if isinstance(row, dict) and layout_of(row, place, self.row_layout) in CONVERSATIONS:
                raise DataError(f"{place}: {NO_CHAT}")

    def _bins(self, split: str, rows: LearnedRows, multiple: int) -> list[list[int]]:
        check_packed_length(self.seq_length, multiple)
        bins = best_fit_decreasing(rows.lengths, self.seq_length)
        used = efficiency(rows.lengths, bins, self.seq_length)
        self.report[split].update(Report(packed_rows=len(bins), packing_efficiency=used))
        return bins

    def _learned(self, split: str) -> LearnedRows:
        path = self._source(split)
        around, weights = self._around(), self.train_weights
        rows, report = learned_rows(path, self.encoder, cache_root(self.cache_dir), self.row_layout)
        check_ids(report["largest_id"], around.vocabulary, title(path))
        check_adapters(report["adapters"], around.adapters, title(path))
        rows = rows.take(self._share_of(split, rows.shares))
        if split == "train" and weights is not None:
            files = [len(files_of(part)) for part in parts(path)]
            rows = rows.take(blended(rows.counts(files), weights, self.seed))
        if report["file"] not in {told["file"] for told in self.report.values()}:
            tell(report, self._limits, shown=around.is_first)
        self.report[split] = report.copy()
        self._rows[split] = rows
        return rows

    def _share_of(self, split: str, shares: numpy.ndarray) -> numpy.ndarray:
        """Numbers of the rows that belong to ``split`` where the training file is divided; else all of them."""
        held_out = shares < self.validation_fraction
        if self.validation_fraction == 0 or split not in ("train", "validation"):
            return numpy.arange(len(shares))
        if held_out.all() or not held_out.any():
            raise DataError(
                f"validation_fraction={self.validation_fraction} holds out {held_out.sum()} of {len(shares)} rows of "
                f"{title(self._source('train'))!r}; both parts need at least one."
            )
        return numpy.flatnonzero(held_out if split == "validation" else ~held_out)

    def _source(self, split: str) -> Source:
        """What ``split`` is read from."""
        held_out = split == "validation" and self.validation_fraction > 0
        path = self.files.get("train" if held_out else split)
        if path is None:
            given = [name for name, file in self.files.items() if file is not None]
            raise DataError(f"the data module has no {split!r} file; {suggest(split, given)}")
        return path

    @property
    def _limits(self) -> str:
        told = f"seq_length={self.seq_length}"
        return told if self.answer_length is None else f"{told}, answer_length={self.answer_length}"

    def _check_settings(self, too_long: str) -> None:
        for name, least in (("seq_length", 2), ("micro_batch_size", 1), ("global_batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; it must be at least {least}.")
        if self.answer_length is not None and self.answer_length < 1:
            raise ConfigError(f"answer_length={self.answer_length} is too small; it must be at least 1.")
        check_deal(self.global_batch_size, self.micro_batch_size, 1)
        check_row_layout(self.row_layout)
        if self.train_weights is not None:
            check_weights(self.train_weights, len(list(named(self.files["train"]))))
        if too_long not in TOO_LONG:
            raise ConfigError(f"too_long={too_long!r} is unknown; {suggest(too_long, TOO_LONG)}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction={self.validation_fraction} must be in [0, 1).")
        if self.validation_fraction and self.files["validation"] is not None:
            raise ConfigError("set either a 'validation' file or validation_fraction, not both.")
