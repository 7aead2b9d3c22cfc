"""Several adapters of one method: kept, frozen or trained as asked, and never mistaken for one another."""

import pytest
import torch

from graftwork.errors import MatchError
from graftwork.models import GPT
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PTuning
from tests.contracts.methods import loss, make, prompted, shake, tokens

MAKERS = {
    "lora": lambda name: LoRA(name, dim=4),
    "canonical": lambda name: CanonicalAdapter(name, dim=4),
    "ia3": lambda name: IA3(name),
    "ptuning": lambda name: PTuning(name, virtual_tokens=2, embedding_dim=8, bottleneck_dim=8, init_std=0.3),
}
every_method = pytest.mark.parametrize("method", MAKERS)


def of(method: str, name: str) -> PEFT:
    return MAKERS[method](name)


def trained(model: GPT) -> set[str]:
    return {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}


@every_method
@pytest.mark.fault(
    "a second method freezes the first, and drops it from the file",
    "a stack owns all its adapters; each is trained and saved",
)
def test_a_second_one_keeps_the_first(method: str) -> None:
    model = make()
    model.add_adapter(of(method, "first"))
    shake(model)
    ids = prompted(model, tokens())
    before = model(ids)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.add_adapter(of(method, "second"), trainable=True)
    assert torch.equal(model(ids), before)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters() if n in values)
    assert trained(model) == {"first", "second"}


@every_method
def test_each_is_frozen_or_trainable_as_asked(method: str) -> None:
    model = make()
    model.add_adapter(of(method, "first"))
    model.add_adapter(of(method, "second"), trainable=False)
    assert trained(model) == {"first"}
    model.train_adapters(["second"])
    assert trained(model) == {"second"}
    shake(model, 0.05)
    loss(model).backward()
    for name in ("first", "second"):
        gradients = [p.grad for a in model.stack.adapters(name) for p in a.parameters()]
        assert all((g is None) == (name == "first") for g in gradients)
    with pytest.raises(MatchError, match="did you mean 'second'"):
        model.train_adapters(["secnd"])
    assert trained(model) == {"second"}


@every_method
@pytest.mark.fault(
    "an adapter whose name is part of another's leaks into its file",
    "names are whole keys",
)
def test_names_that_contain_one_another(method: str, tmp_path) -> None:
    model = make()
    model.add_adapter([of(method, "a"), of(method, "ab"), of(method, "b_a")])
    shake(model)
    model.save_adapters(tmp_path / "one", names=["a"])
    other = make()
    other.load_adapters(tmp_path / "one")
    assert list(other.adapters) == ["a"]
    values = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, values[name])
    model.delete_adapter("a")
    assert list(model.adapters) == ["ab", "b_a"]
    assert {n.split(".adapters.")[1].split(".")[0] for n in model.state_dict() if ".adapters." in n} == {"ab", "b_a"}


def test_prompts_have_their_own_ids_also_after_one_is_deleted() -> None:
    model = make()
    model.add_adapter([of("ptuning", "first"), of("ptuning", "second")])
    first, second = model.prompt_layout.ids("first"), model.prompt_layout.ids("second")
    assert len({*first, *second}) == 4
    shake(model)
    ids = torch.tensor([[*second, 1, 2, 3]])
    before = model(ids)
    model.delete_adapter("first")
    assert model.prompt_layout.ids("second") == second and torch.equal(model(ids), before)
    model.add_adapter(of("ptuning", "third"))
    assert not set(model.prompt_layout.ids("third")) & set(second)


def test_virtual_tokens_may_stand_anywhere() -> None:
    """Each virtual id brings its own row, wherever it is; equal to putting the rows in by hand."""
    model = make()
    model.add_adapter([of("ptuning", "p"), of("ptuning", "q")])
    shake(model, 0.1)
    (p0, p1), (q0, q1) = model.prompt_layout.ids("p"), model.prompt_layout.ids("q")
    ids = torch.tensor([[3, q1, 5, p0, p1, 7], [q0, q1, 4, 4, p1, 9]])
    embedding = model.module.embedding.word_embeddings
    tables = {n: next(model.stack.adapters(n)).rows() for n in ("p", "q")}
    rows = {p0: ("p", 0), p1: ("p", 1), q0: ("q", 0), q1: ("q", 1)}

    def row(token: int) -> torch.Tensor:
        return tables[rows[token][0]][rows[token][1]] if token in rows else embedding.weight[token]

    wanted = torch.stack([torch.stack([row(int(t)) for t in line]) for line in ids])
    assert torch.equal(embedding(ids), wanted)


def test_lora_on_the_embedding_and_prompts_in_either_order() -> None:
    for order in (0, 1):
        model = make()
        stack = [LoRA(dim=4, target_modules=["word_embeddings"]), of("ptuning", "p")]
        model.add_adapter(stack[::-1] if order else stack)
        shake(model, 0.1)
        embedding = model.module.embedding.word_embeddings
        low_rank, table = next(model.stack.adapters("lora")), next(model.stack.adapters("p")).rows()
        ids = torch.tensor([[*model.prompt_layout.ids("p"), 0, 7]])
        words = embedding.weight[[0, 7]] + 8 * low_rank.lora_A[[0, 7]] @ low_rank.lora_B.T
        assert torch.allclose(embedding(ids)[0], torch.cat([table, words]), atol=1e-6)
