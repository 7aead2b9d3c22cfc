"""Requests to a model that is not built: in order, refused ones wait on, and what a run decides is set once."""

import pytest

from graftwork.errors import ArtifactError, MatchError
from graftwork.models import GPT, MODELS, Model
from graftwork.models.pending import Add, Freeze, Load, Pending
from graftwork.models.shapes import Shape
from graftwork.optim import AdamW
from graftwork.peft import IA3, LoRA

SHAPE = Shape(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    vocab_size=20,
    max_position_embeddings=32,
)


def test_requests_are_carried_out_in_order_and_once():
    pending, done = Pending(), []
    requests = [Add(LoRA(dim=2)), Load("somewhere", names=["lora"]), Freeze()]
    pending.put(*requests)
    pending.carry_out(done.append)
    pending.carry_out(done.append)
    assert done == requests


def test_what_is_refused_and_all_after_it_wait_on():
    pending, done = Pending(), []
    first, second, third = Add(LoRA(dim=2)), Add(IA3()), Freeze()
    pending.put(first, second, third)

    def do(request):
        if request is second and not done[1:]:
            done.append("refused")
            raise MatchError("not now.")
        done.append(request)

    with pytest.raises(MatchError, match="not now"):
        pending.carry_out(do)
    assert list(pending.transforms) == ["ia3"] and done == [first, "refused"]
    pending.carry_out(do)
    assert done == [first, "refused", second, third] and not pending.transforms


def test_a_request_can_be_dropped_by_name():
    pending, done = Pending(), []
    pending.put(Add(LoRA(dim=2)), Add(IA3()))
    assert pending.drop("lora") and not pending.drop("lora")
    pending.carry_out(done.append)
    assert [request.transform.name for request in done] == ["ia3"]


def test_a_target_that_matches_nothing_waits_until_it_is_deleted():
    model = GPT(SHAPE, dtype="fp32")
    model.add_adapter([LoRA(dim=2), LoRA(name="wrong", target_modules=["nowhere"])])
    with pytest.raises(MatchError, match="nowhere"):
        model.configure_model()
    with pytest.raises(MatchError, match="nowhere"):
        model.configure_model()
    model.delete_adapter("wrong")
    model.configure_model()
    assert list(model.stack.transforms) == ["lora"]


def test_a_run_sets_optimizer_and_seed_until_the_model_is_built():
    model, optim = GPT(SHAPE, dtype="fp32", seed=1), AdamW(lr=1.0)
    model.prepare(optim=optim, seed=7)
    assert model.optim is optim and model.seed == 7
    model.configure_model()
    model.prepare(seed=8)
    assert model.optim is optim and model.seed == 7, "its weights are drawn already"


def test_every_kind_of_model_is_entered_by_name():
    assert MODELS["gpt"] is GPT and all(issubclass(kind, Model) for kind in MODELS.values())


def test_a_waiting_artifact_that_was_replaced_is_refused(tmp_path):
    """What was seen when it was asked for is what is loaded when the model is built."""

    def saved(path, dim):
        model = GPT(SHAPE, dtype="fp32")
        model.configure_model()
        model.add_adapter(LoRA(dim=dim))
        return model.save_adapters(path)

    asked, other = saved(tmp_path / "asked", 2), saved(tmp_path / "other", 3)
    model = GPT(SHAPE, dtype="fp32")
    model.load_adapters(asked)
    asked.rename(tmp_path / "away")
    other.rename(asked)
    with pytest.raises(ArtifactError, match="is not the one that was there when load_adapters was called"):
        model.configure_model()
    assert not model.adapters
    asked.rename(other)
    (tmp_path / "away").rename(asked)
    model.configure_model()
    assert model.adapters["lora"].dim == 2
