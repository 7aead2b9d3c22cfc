"""Tensors that an adapter holds in part only: where they are NaN, what the base gave stays."""

import torch
from torch import Tensor

from graftwork.parallel.record import record_of
from graftwork.peft.artifact.tensors import Contents
from graftwork.peft.trained import TrainedTensor


class PartialContents(Contents):
    """Contents whose values are finite or, where an adapter changes nothing, NaN: there a tensor is as it was born."""

    def value(self, tensor: TrainedTensor) -> Tensor:
        """Return this rank's part of one tensor."""
        record = record_of(tensor.parameter)
        held = record.sharding.read(self.stored[tensor.key], *record.place)
        return torch.where(held.isnan(), tensor.value.cpu(), held)
