"""The GPT LightningModule: logits, losses, packing, padding, precision, queued adapters, plain Lightning."""

import copy
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from graftwork.batch import IGNORED, Batch
from graftwork.errors import ConfigError, TrainingError
from graftwork.models import GPT
from graftwork.models.loss import mask_padded_vocabulary
from graftwork.models.shapes import Shape
from graftwork.peft import LoRA, PTuning

VOCABULARY = 101


def tiny(**options):
    shape = Shape(
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    model = GPT(shape, **{"dtype": "fp32", **options})
    model.configure_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model


def batch_of(rows=3, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[:, : length // 2] = IGNORED
    return replace(Batch.of(tokens, labels), rows=torch.arange(rows).unsqueeze(1), micro_batch_size=rows)


def packed(batch, lengths):
    """Put the first ``lengths[i]`` tokens of row i one behind the other, then a tail of padding, in one row."""
    total = sum(lengths) + 5
    tokens, positions = (torch.zeros(1, total, dtype=torch.long) for _ in range(2))
    labels = torch.full((1, total), IGNORED)
    bounds = [0]
    for row, length in enumerate(lengths):
        place = slice(bounds[-1], bounds[-1] + length)
        tokens[0, place] = batch.tokens[row, :length]
        labels[0, place] = batch.labels[row, :length]
        positions[0, place] = batch.position_ids[row, :length]
        bounds.append(bounds[-1] + length)
    return Batch(tokens, labels, positions, torch.tensor([[*bounds, total]], dtype=torch.int32))


@pytest.mark.fault(
    "labels are shifted twice: once by the data and once by the model",
    "labels are shifted by the data alone; the loss equals the dense formula",
)
def test_loss_is_the_dense_formula_over_answer_tokens():
    model, batch = tiny(), batch_of()
    loss_sum, count = model._loss(batch)
    answers = batch.labels != IGNORED
    dense = F.cross_entropy(model(batch.tokens)[answers], batch.labels[answers], reduction="sum")
    assert count == answers.sum()
    torch.testing.assert_close(loss_sum, dense, rtol=1e-6, atol=0)


def test_a_batch_without_answers_has_no_loss_and_is_refused_in_training():
    model, batch = tiny(), batch_of()
    batch.labels.fill_(IGNORED)
    loss_sum, count = model._loss(batch)
    assert loss_sum == 0 and count == 0 and loss_sum.requires_grad
    with pytest.raises(TrainingError, match="no answer token"):
        model.training_step(batch, 0)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_give_the_unpacked_logits(rows):
    model, batch = tiny(), batch_of(rows=4)
    lengths = [12, 5, 9, 7]
    whole = model(batch.tokens)
    parts = [packed(batch._rows(slice(i, None, rows)), lengths[i::rows]) for i in range(rows)]
    width = max(part.tokens.shape[1] for part in parts)
    tokens, positions = (
        torch.cat([F.pad(getattr(part, name), (0, width - part.tokens.shape[1])) for part in parts])
        for name in ("tokens", "position_ids")
    )
    most = max(part.cu_seqlens.shape[1] for part in parts)
    bounds = [F.pad(part.cu_seqlens, (0, most + 1 - part.cu_seqlens.shape[1]), value=width) for part in parts]
    flat = Batch(tokens, torch.full_like(tokens, IGNORED), positions, torch.cat(bounds)).in_one_line()
    logits = model.run_chunk(model.chunks[0], flat).view(rows, width, -1)
    for part in range(rows):
        start = 0
        for row, length in zip(range(part, 4, rows), lengths[part::rows], strict=True):
            torch.testing.assert_close(logits[part, start : start + length], whole[row, :length], rtol=0, atol=1e-5)
            start += length


@pytest.mark.fault(
    "cu_seqlens get lost on the way to the attention",
    "a pack without boundaries has other logits, which the comparison notices",
)
def test_packing_without_boundaries_would_be_noticed():
    model, batch = tiny(), batch_of()
    row = packed(batch, [12, 5, 9])
    flat = row.in_one_line()
    flat.cu_seqlens = flat.cu_seqlens[[0, -1]]
    leaked = model.run_chunk(model.chunks[0], flat)[0, 12:17]
    assert (leaked - model(batch.tokens)[1, :5]).abs().max() > 1e-3


def test_packed_loss_equals_padded_loss():
    model, batch = tiny(), batch_of()
    batch.labels[1, 5:] = IGNORED
    batch.labels[2, 9:] = IGNORED
    padded_sum, padded_count = model._loss(batch)
    packed_sum, packed_count = model._loss(packed(batch, [12, 5, 9]))
    assert packed_count == padded_count
    torch.testing.assert_close(packed_sum, padded_sum, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logit(side):
    model, ids = tiny(), batch_of().tokens
    lengths = [12, 7, 3]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(12 - length, 12)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    logits = model(padded, mask)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length])[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=0, atol=1e-5)
        assert not logits[row][~mask[row].bool()].any()


@pytest.mark.fault(
    "padding of the vocabulary takes part in the softmax",
    "padding rows have the logit minus infinity",
)
def test_padding_of_the_vocabulary_has_no_probability():
    logits = torch.zeros(2, 8)
    masked = mask_padded_vocabulary(logits, 5)
    torch.testing.assert_close(masked.softmax(-1), torch.tensor([[0.2] * 5 + [0.0] * 3] * 2))


def test_dtype_names(monkeypatch):
    assert next(tiny(dtype="bf16").parameters()).dtype == torch.bfloat16
    monkeypatch.setattr("graftwork.models.precision.bf16_is_fast", lambda: True)
    assert next(tiny(dtype="auto").parameters()).dtype == torch.bfloat16
    monkeypatch.setattr("graftwork.models.precision.bf16_is_fast", lambda: False)
    assert next(tiny(dtype="auto").parameters()).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"dtype is 'bf61'; did you mean 'bf16'"):
        tiny(dtype="bf61")


@pytest.mark.fault(
    "recompute over a frozen embedding gives no gradient at all",
    "the input of a recomputed block requires a gradient; gradients equal those without recompute",
)
def test_full_recompute_over_a_frozen_embedding_gives_the_same_gradients():
    gradients = []
    for recompute in (None, "full"):
        model = tiny(recompute=recompute)
        model.add_adapter(LoRA(dim=4, lora_B_init_method="normal"))
        loss_sum, _ = model._loss(batch_of())
        loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g.any() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_adapters_asked_for_before_the_model_is_built():
    direct = tiny()
    direct.add_adapter([LoRA(dim=4), PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)])
    queued = GPT(direct.shape, dtype="fp32")
    queued.add_adapter([LoRA(dim=4), PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)])
    assert list(queued.adapters) == ["lora", "ptuning"] and not queued.chunks
    queued.freeze()
    queued.configure_model()
    assert dict(queued.named_parameters()).keys() == dict(direct.named_parameters()).keys()
    assert not any(p.requires_grad for p in queued.parameters()) and not queued.training
    assert queued.prompt_layout == direct.prompt_layout


class Rows(pl.LightningDataModule):
    """Eight random rows as one training and one validation batch."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader([batch_of(seed=i) for i in range(2)], batch_size=None)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("adapters", [[], [LoRA(dim=4)]], ids=["full", "lora"])
def test_a_plain_lightning_trainer_trains_what_it_should(adapters, tmp_path):
    model = tiny()
    if adapters:
        model.add_adapter(adapters)
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(model, datamodule=Rows(), verbose=False)
    first = float(trainer.callback_metrics["val_loss"])
    trainer.fit(model, datamodule=Rows())
    assert float(trainer.callback_metrics["val_loss"]) < first
    for name, parameter in model.named_parameters():
        changes = not adapters or ".adapters." in name
        assert torch.equal(parameter, before[name]) is not changes, name
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)["state_dict"]
    assert set(saved) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_mask_with_a_hole_is_refused():
    """Positions after a hole differ from those of other libraries: nobody could say which are meant."""
    ids = batch_of().tokens
    mask = torch.ones_like(ids)
    mask[1, 4:6] = 0
    with pytest.raises(ConfigError, match="attention_mask has a hole in row 1"):
        tiny()(ids, mask)
