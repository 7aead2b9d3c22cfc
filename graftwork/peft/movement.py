"""How far training has moved every site of a stack: where in the model it learned."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt

import torch.distributed as dist
from torch import Tensor, nn

from graftwork.parallel.record import record_of
from graftwork.parallel.state import tp_group
from graftwork.peft.adapter import Adapter, Birth, Product
from graftwork.peft.report import everywhere
from graftwork.peft.stack import Grafted, Stack
from graftwork.peft.wrapper import parameter_device


@dataclass(frozen=True)
class Movement:
    """How far one adapter has moved at one site: Frobenius ``norm`` over so many ``numbers``, of the whole tensors.

    ``of_weight``: measured is the change ``scale * B A`` of the weight that stands there, which has ``numbers``
    elements; else the trained numbers themselves, against their values at birth.
    """

    site: str
    adapter: str
    norm: float
    numbers: int
    of_weight: bool

    @property
    def rms(self) -> float:
        """Root mean square of the change of one number: sites of different sizes compare by it."""
        return self.norm / sqrt(self.numbers)


@dataclass(frozen=True)
class _Part:
    """The sum of squared changes of some numbers of a site."""

    square: float
    numbers: int
    of_weight: bool


def movements(stack: Stack) -> list[Movement]:
    """Return how far every site has moved, of the whole model in its order; collective over all ranks.

    Of low-rank updates nothing as large as a weight is made, by |B A|^2 = tr(B^T B A A^T). Of other adapters the
    values at birth are made again, which follow from seed and names; the base's own tensors have theirs beside them.
    """
    found = []
    for name in stack.transforms:
        parts: dict[str, list[_Part]] = {}
        for site, part in _parts(stack, name):
            parts.setdefault(site, []).append(part)
        found += [_joined(site, name, of_site) for site, of_site in parts.items()]
    return everywhere(found)


def _joined(site: str, adapter: str, parts: list[_Part]) -> Movement:
    norm = sqrt(sum(part.square for part in parts))
    return Movement(site, adapter, norm, sum(part.numbers for part in parts), parts[0].of_weight)


def _parts(stack: Stack, name: str) -> Iterator[tuple[str, _Part]]:
    for item in stack.grafted[name]:
        products = item.adapter.products()
        if products:
            yield from ((item.site.name, _of_product(product)) for product in products)
        elif any(True for _ in item.adapter.parameters()):
            born = dict(_born(stack, name, item).named_parameters())
            moved = [(p, born[key].detach()) for key, p in item.adapter.named_parameters() if key in born]
            yield from ((item.site.name, _of_values(p, before)) for p, before in moved)
    for lent in stack.lent[name]:
        yield lent.tensor.name.rpartition(".")[0], _of_values(lent.parameter, lent.held)


def _born(stack: Stack, name: str, item: Grafted) -> Adapter:
    """Return the adapter of one site as it was before anything trained it."""
    host = stack.host
    birth = Birth(host.seed, name, item.site.name, parameter_device(host.chunks[item.site.chunk]))
    adapter = stack.transforms[name].build(item.site, birth, host)
    adapter.derive()
    return adapter


def _of_product(product: Product) -> _Part:
    A, B = product.A.detach().double(), product.B.detach().double()
    inputs, outputs = _whole(A @ A.t(), product.A), _whole(B.t() @ B, product.B)
    square = product.scale**2 * float((inputs * outputs).sum())
    numbers = record_of(product.A).sharding.shape[1] * record_of(product.B).sharding.shape[0]
    return _Part(max(square, 0.0), numbers, True)


def _of_values(parameter: nn.Parameter, before: Tensor) -> _Part:
    square = (parameter.detach().double() - before.double()).square().sum()
    return _Part(float(_whole(square, parameter)), prod(record_of(parameter).sharding.shape), False)


def _whole(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the sum over the ranks that hold the other parts of a tensor."""
    if record_of(parameter).cut and tp_group().size() > 1:
        dist.all_reduce(part, group=tp_group())
    return part
