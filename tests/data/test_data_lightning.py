"""A real Lightning Trainer drives the data module: no second sharding, no reshuffling, exact resumption."""

import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from graftwork.batch import Batch, Questions
from graftwork.data import SFTDataModule
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout, PromptSlot
from tests.helpers.reviews import REVIEWS


class Recorder(pl.LightningModule):
    """Stands where the model stands: has a tokenizer and a layout, and writes down which rows it sees."""

    def __init__(self, tokenizer, layout: PromptLayout | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.prompt_layout = layout or PromptLayout()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list] = {"train": [], "val": [], "test": [], "predict": []}

    def _see(self, stage: str, batch) -> torch.Tensor:
        self.seen[stage].append(batch.rows.flatten().tolist())
        return self.weight * batch.tokens.shape[0]

    def training_step(self, batch, index):
        self.virtual = int((batch.tokens >= VIRTUAL_BASE).sum())
        return self._see("train", batch)

    def validation_step(self, batch, index):
        self._see("val", batch)

    def test_step(self, batch, index):
        self._see("test", batch)

    def predict_step(self, batch, index):
        self.seen["predict"].append(batch.rows)
        return [{"input": i, "output": o} for i, o in zip(batch.inputs, batch.outputs)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneOfTwo(DDPStrategy):
    """A strategy that is distributed and says it is data-parallel rank 1 of 2, in one process."""

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": 2, "rank": 1}


@pytest.fixture
def train(write):
    return write("train.jsonl", REVIEWS)


@pytest.fixture
def trainer(tmp_path):
    def make(**settings) -> pl.Trainer:
        defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
        return pl.Trainer(**{**defaults, **quiet, **settings})

    return make


def data_of(train, **settings) -> SFTDataModule:
    return SFTDataModule(train, **{"global_batch_size": 4, "seq_length": 64, **settings})


def by_hand(tokenizer, train, steps: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    data = data_of(train).attach(tokenizer, rank=rank, world_size=world)
    data.train_dataloader()
    stream = data._stream
    return [stream.batch(4 * i)[rank::world] for i in range(steps)]


def test_epochs_go_on_through_the_stream(tokenizer, train, trainer):
    model = Recorder(tokenizer, PromptLayout((PromptSlot("p", 0, 3),)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(max_epochs=3, num_sanity_val_steps=2).fit(model, datamodule=data_of(train, validation=train))
    assert not [str(w.message) for w in said if "loader" in str(w.message) or "workers" in str(w.message)]
    assert model.seen["train"] == by_hand(tokenizer, train, 18)
    assert model.virtual == 4 * 3  # the layout of the model's adapters is used
    assert [r for rows in model.seen["val"][2:8] for r in rows if r >= 0] == list(range(23))


def test_limited_epochs_go_on_too(tokenizer, train, trainer):
    model = Recorder(tokenizer)
    trainer(max_epochs=3, limit_train_batches=2).fit(model, datamodule=data_of(train))
    assert model.seen["train"] == by_hand(tokenizer, train, 6)


def test_steps_beyond_an_epoch(tokenizer, train, trainer):
    model = Recorder(tokenizer)
    trainer(max_steps=10, max_epochs=-1).fit(model, datamodule=data_of(train))
    assert model.seen["train"] == by_hand(tokenizer, train, 10)


def test_a_second_fit_sees_what_the_first_saw(tokenizer, train, trainer):
    data = data_of(train)
    for _ in range(2):
        model = Recorder(tokenizer)
        trainer(max_steps=5).fit(model, datamodule=data)
        assert model.seen["train"] == by_hand(tokenizer, train, 5)


def test_overfitting_repeats_the_same_batches(tokenizer, train, trainer):
    model = Recorder(tokenizer)
    trainer(max_epochs=2, overfit_batches=2).fit(model, datamodule=data_of(train))
    assert model.seen["train"] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.fault(
    "the order of the data starts anew after a resume",
    "the position in the data is part of the training state",
)
@pytest.mark.parametrize("stop", [4, 6, 9])
def test_resumed_in_mid_epoch(tokenizer, train, trainer, tmp_path, stop):
    first = Recorder(tokenizer)
    half = trainer(max_steps=stop, max_epochs=-1)
    half.fit(first, datamodule=data_of(train))
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Recorder(tokenizer)
    trainer(max_steps=15, max_epochs=-1).fit(second, datamodule=data_of(train), ckpt_path=str(tmp_path / "half.ckpt"))
    assert first.seen["train"] + second.seen["train"] == by_hand(tokenizer, train, 15)


@pytest.mark.fault(
    "a distributed sampler is put around rows that are dealt already",
    "the data module deals alone, and says so to the trainer",
)
def test_lightning_deals_no_second_time(tokenizer, train, trainer, write):
    """``use_distributed_sampler`` is on by default; our loaders must come through untouched."""
    model = Recorder(tokenizer)
    data = data_of(train, validation=train, test=train, predict=write("p.jsonl", REVIEWS[:5]))
    driver = trainer(max_steps=6, strategy=OneOfTwo(process_group_backend="gloo"))
    driver.fit(model, datamodule=data)
    assert model.seen["train"] == by_hand(tokenizer, train, 6, rank=1, world=2)
    model.seen["val"].clear()
    driver.validate(model, datamodule=data, verbose=False)
    driver.test(model, datamodule=data, verbose=False)
    wanted = [[1, 3], [5, 7], [9, 11], [13, 15], [17, 19], [21, -1]]
    assert model.seen["val"] == model.seen["test"] == wanted
    driver.predict(model, datamodule=data)
    # Not vacuous: a plain loader is dealt a second time here.
    model.seen["val"].clear()
    plain = [replace(Batch.of(torch.zeros(1, 1, dtype=torch.int64)), rows=torch.tensor([i])) for i in range(4)]
    driver.validate(model, dataloaders=DataLoader(plain, batch_size=None), verbose=False)
    assert model.seen["val"] == [[1], [3]]
    assert model.seen["predict"] == [[1], [3]]
    torch.distributed.destroy_process_group()


def test_worker_processes_hand_their_batches_to_the_trainer(tokenizer, train, trainer):
    model = Recorder(tokenizer)
    trainer(max_epochs=1).fit(model, datamodule=data_of(train, num_workers=1))
    assert model.seen["train"] == by_hand(tokenizer, train, 6)


def test_lightning_moves_batches_to_the_device():
    batch = replace(Batch.of(torch.zeros(2, 3, dtype=torch.int64)), rows=torch.zeros(2, 1), micro_batch_size=1)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch) and (moved.packed, moved.micro_batch_size) == (False, 1)
    assert all(t.is_meta for t in (moved.tokens, moved.labels, moved.position_ids, moved.rows))
    questions = Questions([[1]], ["a"], [None])
    assert move_data_to_device(questions, torch.device("meta")) is questions


def test_predictions(tokenizer, train, trainer):
    found = trainer().predict(Recorder(tokenizer), datamodule=data_of(None, test=train, micro_batch_size=4))
    assert [row for batch in found for row in batch] == REVIEWS
