"""Tasks of a prompt: each has rows of its own, and none changes when another is added, trained, renamed or removed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftwork.errors import ArtifactError, ConfigError, MatchError
from graftwork.models import GPT
from graftwork.parallel.record import record_of
from graftwork.peft import PEFT, CanonicalAdapter, LoRA, PromptTuning, PTuning
from graftwork.virtual_tokens import VIRTUAL_BASE
from tests.contracts.methods import adapter_parameters, make, shake, tokens

TASKS = {"squad": 3, "mood": 2}
KINDS = {
    "mlp": lambda tasks: PTuning("p", embedding_dim=8, bottleneck_dim=8, init_std=0.3, tasks=dict(tasks)),
    "lstm": lambda tasks: PTuning("p", embedding_dim=6, bottleneck_dim=5, encoder="lstm", tasks=dict(tasks)),
    "table": lambda tasks: PromptTuning("p", tasks=dict(tasks)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def asked(model: GPT, task: str, name: str = "p") -> Tensor:
    """Return rows with the prompt of one task in front."""
    ids = tokens()
    return torch.cat([torch.tensor(model.prompt_layout.ids(name, task)).expand(len(ids), -1), ids], dim=1)


def logits(model: GPT, task: str) -> Tensor:
    with torch.no_grad():
        return model(asked(model, task))


def values(model: GPT, task: str) -> dict[str, Tensor]:
    return {t.key: t.value.clone() for t in model.stack.tensors("p") if f".tasks.{task}." in t.key}


def train(model: GPT, task: str, steps: int = 3) -> None:
    """Train what trains on rows of one task."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(asked(model, task)).square().mean().backward()
        optimizer.step()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def built(kind: str, tasks: dict[str, int], *more: PEFT) -> GPT:
    model = make()
    model.add_adapter([KINDS[kind](tasks), *more])
    return model


@every_kind
def test_a_task_is_a_prompt_of_its_own(kind: str) -> None:
    """With the values of a single prompt, a task gives its logits, beside whatever other tasks."""
    model, single = built(kind, TASKS), make()
    shake(model)
    transform = KINDS[kind](TASKS)
    options = transform.hyperparameters() | {"tasks": None, "virtual_tokens": 2}
    single.add_adapter(type(transform)(**options))
    with torch.no_grad():
        for tensor in single.stack.tensors("p"):
            of_task = values(model, "mood")[tensor.key.replace(tensor.name, f"tasks.mood.{tensor.name}")]
            tensor.parameter.copy_(of_task)
    ids = torch.cat([torch.tensor(single.prompt_layout.ids("p")).expand(2, -1), tokens()], dim=1)
    with torch.no_grad():
        assert torch.equal(logits(model, "mood"), single(ids))
    assert not torch.equal(logits(model, "mood")[:, -1], logits(model, "squad")[:, -1])


@every_kind
def test_a_task_is_born_alike_whatever_others_there_are(kind: str) -> None:
    both, late = built(kind, TASKS), built(kind, {"squad": 3})
    late.add_tasks("p", {"mood": 2})
    assert same(values(both, "mood"), values(late, "mood")) and same(values(both, "squad"), values(late, "squad"))
    assert late.prompt_layout == both.prompt_layout
    assert repr(late.adapters["p"]) == repr(both.adapters["p"])


@every_kind
def test_a_row_of_one_task_is_the_same_beside_rows_of_others(kind: str) -> None:
    model = built(kind, {"squad": 2, "mood": 2})
    shake(model)
    rows = torch.cat([asked(model, "squad")[:1], asked(model, "mood")[1:]])
    with torch.no_grad():
        mixed = model(rows)
    assert torch.allclose(mixed[0], logits(model, "squad")[0], atol=1e-6)
    assert torch.allclose(mixed[1], logits(model, "mood")[1], atol=1e-6)


@every_kind
def test_training_a_new_task_on_an_artifact_leaves_the_old_ones_bit_identical(kind: str, tmp_path: Path) -> None:
    first = built(kind, {"squad": 3}, CanonicalAdapter(dim=4))
    train(first, "squad")
    before, was = values(first, "squad"), logits(first, "squad")
    first.save_adapters(tmp_path / "a")

    model = make()
    model.load_adapters(tmp_path / "a")
    model.add_tasks("p", {"mood": 2})
    assert {record_of(p).owner for p in model.parameters() if p.requires_grad} == {"p"}  # not the canonical adapter
    born = values(model, "mood")
    train(model, "mood")
    assert not same(values(model, "mood"), born)
    assert same(values(model, "squad"), before) and torch.equal(logits(model, "squad"), was)
    model.save_adapters(tmp_path / "b")

    again = make()
    again.load_adapters(tmp_path / "b")
    assert same(values(again, "squad"), before) and torch.equal(logits(again, "squad"), was)
    assert torch.equal(logits(again, "mood"), logits(model, "mood"))


@every_kind
def test_an_artifact_with_fewer_tasks_keeps_its_values_and_the_new_ones_train(kind: str, tmp_path: Path) -> None:
    first = built(kind, {"squad": 3})
    shake(first)
    first.save_adapters(tmp_path / "a")
    model = built(kind, TASKS)
    born = values(model, "mood")
    model.load_adapters(tmp_path / "a")
    assert same(values(model, "squad"), values(first, "squad")) and same(values(model, "mood"), born)
    assert torch.equal(logits(model, "squad"), logits(first, "squad"))
    training = [n for n, p in adapter_parameters(model) if p.requires_grad]
    assert training == [n for n, _ in adapter_parameters(model) if ".tasks.mood." in n]
    assert model.stack.training_tasks() == {"p": ["mood"]}


def test_requests_for_tasks_wait_until_the_model_is_built(tmp_path: Path) -> None:
    first = built("table", {"squad": 3})
    shake(first)
    first.save_adapters(tmp_path / "a")
    model, late = make(), GPT(first.shape, dtype="fp32")
    late.load_adapters(tmp_path / "a")
    late.add_tasks("p", {"mood": 2})
    late.rename_task("p", "squad", "qa")
    late.configure_model()
    model.load_adapters(tmp_path / "a")
    model.add_tasks("p", {"mood": 2})
    assert list(late.adapters["p"].tasks or ()) == ["qa", "mood"]
    assert all(torch.equal(a, b) for a, b in zip(values(late, "qa").values(), values(model, "squad").values()))


@every_kind
def test_removing_and_renaming_tasks_keeps_the_others(kind: str, tmp_path: Path) -> None:
    model = built(kind, {"a": 2, "b": 3, "c": 1}, LoRA(dim=2))
    shake(model)
    was = {task: logits(model, task) for task in "abc"}
    model.remove_task("p", "b")
    model.rename_task("p", "c", "mood")
    assert model.adapters["p"].tasks == {"a": 2, "mood": 1}
    assert torch.equal(logits(model, "a"), was["a"]) and torch.equal(logits(model, "mood"), was["c"])
    model.save_adapters(tmp_path / "a")
    again = make()
    again.load_adapters(tmp_path / "a")
    assert torch.equal(logits(again, "mood"), was["c"]) and not values(again, "b")
    model.add_tasks("p", {"b": 3})
    assert torch.equal(logits(model, "a"), was["a"]) and torch.equal(logits(model, "mood"), was["c"])
    ids = [i for task in ("a", "mood", "b") for i in model.prompt_layout.ids("p", task)]
    assert len(set(ids)) == 6 and min(ids) >= VIRTUAL_BASE


def test_prompts_stand_in_the_same_order_after_a_task_was_added_as_after_loading(tmp_path: Path) -> None:
    model = built("table", {"a": 2}, PromptTuning("q", virtual_tokens=2))
    model.add_tasks("p", {"b": 1})
    model.save_adapters(tmp_path / "a")
    again = make()
    again.load_adapters(tmp_path / "a")
    for task in "ab":
        found, wanted = (
            [(s.name, s.task) for s in m.prompt_layout.slots if s.task in (None, task)] for m in (model, again)
        )
        assert found == wanted == [("p", task), ("q", None)]


def test_which_tasks_train_can_be_chosen() -> None:
    model = built("mlp", TASKS)
    model.train_tasks("p", ["squad"])
    assert {n.split(".tasks.")[1].split(".")[0] for n, p in adapter_parameters(model) if p.requires_grad} == {"squad"}
    model.train_adapters(["p"])
    assert all(p.requires_grad for _, p in adapter_parameters(model))


def test_a_refused_change_of_tasks_changes_nothing(tmp_path: Path) -> None:
    model = built("mlp", TASKS, LoRA(dim=2))
    single = make()
    single.add_adapter(PTuning("p", embedding_dim=4, bottleneck_dim=4))
    before, layout = {n: p.detach().clone() for n, p in model.named_parameters()}, model.prompt_layout
    refused = [
        (
            lambda: model.add_tasks("p", {"new": 2, "mood": 3}),
            MatchError,
            "already has a task 'mood'; its tasks are sq",
        ),
        (
            lambda: model.add_tasks("lora", {"new": 2}),
            MatchError,
            "LoRA 'lora' has no tasks; only methods with virtual",
        ),
        (lambda: model.add_tasks("q", {"new": 2}), MatchError, "The model has no adapter 'q'"),
        (lambda: model.add_tasks("p", {"new": 0}), ConfigError, r"tasks\['new'\] must be a whole number above 0"),
        (lambda: model.add_tasks("p", {"a.b": 2}), ConfigError, "task's name may hold letters"),
        (lambda: model.add_tasks("p", {"items": 2}), ConfigError, "a task cannot be named 'items'"),
        (lambda: model.add_tasks("p", {"new": 2}, init_text={"new": "x"}), ConfigError, "starts from no text"),
        (lambda: model.remove_task("p", "modo"), MatchError, "has no task 'modo'; did you mean 'mood'"),
        (lambda: model.rename_task("p", "mood", "squad"), MatchError, "already has a task 'squad'"),
        (lambda: model.rename_task("p", "mood", ""), ConfigError, "task's name may hold letters"),
        (lambda: model.train_tasks("p", ["modo"]), MatchError, "has no task 'modo'"),
        (lambda: single.add_tasks("p", {"new": 2}), MatchError, "has one prompt for all rows and no tasks"),
    ]
    for act, kind, said in refused:
        with pytest.raises(kind, match=said):
            act()
    with model.adapters_disabled(), pytest.raises(MatchError, match="switched off"):
        model.add_tasks("p", {"new": 2})
    now = dict(model.named_parameters())
    assert now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)
    assert model.prompt_layout == layout and model.adapters["p"].tasks == TASKS


def test_the_last_task_is_not_removed() -> None:
    model = built("table", {"a": 2})
    with pytest.raises(MatchError, match="'a' is the only task of PromptTuning 'p'; delete the adapter instead"):
        model.remove_task("p", "a")


def test_an_artifact_whose_tasks_have_other_lengths_or_are_more_is_refused(tmp_path: Path) -> None:
    first = built("table", TASKS)
    first.save_adapters(tmp_path / "a")
    for tasks in ({"squad": 3, "mood": 4}, {"squad": 3}):
        model = built("table", tasks)
        before = values(model, "squad")
        with pytest.raises(ArtifactError, match="already has another adapter named 'p'"):
            model.load_adapters(tmp_path / "a")
        assert same(values(model, "squad"), before) and all(p.requires_grad for _, p in adapter_parameters(model))


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: PTuning(tasks={}), "tasks must name each task's number of virtual tokens"),
        (lambda: PTuning(tasks={"a": -1}), r"tasks\['a'\] must be a whole number above 0"),
        (lambda: PTuning(tasks={"a b": 1}), "task's name may hold"),
        (lambda: PTuning(virtual_tokens=5, tasks={"a": 1}), "has virtual_tokens=5, but its tasks say"),
        (lambda: PTuning(encoder="gru"), "encoder is 'gru'; valid: lstm, mlp|encoder is 'gru'"),
        (lambda: PromptTuning(init="words"), "init is 'words'"),
        (lambda: PromptTuning(init="text"), "init='text', but init_text is None"),
        (lambda: PromptTuning(init_text="x"), "init='vocab', but init_text is 'x'"),
        (lambda: PromptTuning(init="text", init_text={"a": "x"}), "init_text is given for a; .*there are none"),
        (
            lambda: PromptTuning(init="text", init_text={"a": "x"}, tasks={"a": 1, "b": 2}),
            "init_text is given for a; give one text, or one for each task: a, b",
        ),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_at_once(make_it, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_it()
