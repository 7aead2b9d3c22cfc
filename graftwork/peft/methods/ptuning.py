"""P-tuning: virtual tokens whose embeddings come from a small encoder (Liu et al. 2021, arXiv 2103.10385)."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.peft.adapter import Birth, Initializer, kaiming_uniform, normal, zeros
from graftwork.peft.methods.prompt_table import VIRTUAL_TOKENS, PromptMethod, PromptTable
from graftwork.peft.sites import Host
from graftwork.virtual_tokens import PromptSlot

ENCODERS = ("mlp", "lstm")
LAYERS = 2
"""Layers of the LSTM; it reads the slots in both directions."""
LSTM_LR = 3e-4
"""Its default learning rate: at that of the MLP some seeds do not learn."""


class EncodedPrompt(PromptTable):
    """A table that an encoder makes of learned slot embeddings [length, e]; it is baked when it is saved."""

    slots: nn.Parameter
    linear_in: nn.Parameter
    bias_in: nn.Parameter
    linear_out: nn.Parameter
    bias_out: nn.Parameter

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the baked table: all that inference needs."""
        with torch.no_grad():
            return {"table": self.rows().detach()}

    def moved(self) -> bool:
        """A trained encoder has a non-zero output bias, which starts at zero."""
        return bool(self.bias_out.detach().any())

    def new_head(self, widths: tuple[int, int, int], init: Initializer) -> None:
        """Register two linears with biases: ``widths`` in, between and out."""
        inside, between, out = widths
        self.new_matrix("linear_in", (between, inside), init)
        self.new_matrix("bias_in", (between,), zeros)
        self.new_matrix("linear_out", (out, between), init)
        self.new_matrix("bias_out", (out,), zeros)


class MLPPrompt(EncodedPrompt):
    """Table = W2 gelu(W1 E + b1) + b2 over learned slot embeddings E [length, e]."""

    def __init__(self, birth: Birth, base: nn.Module, slot: PromptSlot, method: "PTuning", hidden_size: int) -> None:
        super().__init__(birth, base, slot)
        std = method.init_std
        self.new_matrix("slots", (slot.length, method.embedding_dim), normal(std or 1.0))
        widths = (method.embedding_dim, method.bottleneck_dim, hidden_size)
        self.new_head(widths, normal(std) if std else kaiming_uniform)

    def rows(self) -> Tensor:
        """Run the encoder over all slots."""
        return F.linear(F.gelu(F.linear(self.slots, self.linear_in, self.bias_in)), self.linear_out, self.bias_out)


class LSTMPrompt(EncodedPrompt):
    """Table = W2 relu(W1 [h; h'] + b1) + b2, where h and h' [b] are the last states of a bidirectional LSTM over E."""

    def __init__(self, birth: Birth, base: nn.Module, slot: PromptSlot, method: "PTuning", hidden_size: int) -> None:
        super().__init__(birth, base, slot)
        self.names: list[str] = []
        e, b = method.embedding_dim, method.bottleneck_dim
        self.new_matrix("slots", (slot.length, e), normal(1.0))
        for layer in range(LAYERS):
            for direction in ("", "_reverse"):
                self._new_cell(f"l{layer}{direction}", 2 * b if layer else e, b)
        self.new_head((2 * b, 2 * b, hidden_size), kaiming_uniform)

    def rows(self) -> Tensor:
        """Run the encoder over all slots, in order."""
        weights: list[Tensor] = [self.get_parameter(name) for name in self.names]
        state = self.slots.new_zeros(2 * LAYERS, 1, weights[1].shape[1])
        sequence = self.slots.unsqueeze(0)
        # cuDNN wants the weights of all layers in one piece of memory, and warns where they are not.
        with torch.backends.cudnn.flags(enabled=False):
            read, *_ = torch.lstm(sequence, (state, state), weights, True, LAYERS, 0.0, False, True, True)
        return F.linear(F.relu(F.linear(read[0], self.linear_in, self.bias_in)), self.linear_out, self.bias_out)

    def _new_cell(self, name: str, inside: int, b: int) -> None:
        """Register the weights of one layer in one direction, as torch names, orders and draws them."""
        shapes = {"weight_ih": (4 * b, inside), "weight_hh": (4 * b, b), "bias_ih": (4 * b,), "bias_hh": (4 * b,)}
        for key, shape in shapes.items():
            self.names.append(f"lstm_{key}_{name}")
            self.new_matrix(self.names[-1], shape, _uniform(b**-0.5))


class PTuning(PromptMethod):
    """Virtual tokens, embedded by a trained encoder, placed in front of every input.

    Args:
        name: Unique name of this adapter in its model.
        virtual_tokens: Number of virtual tokens.
        embedding_dim: Width of the slot embeddings that the encoder reads.
        bottleneck_dim: Width of the MLP's hidden layer, or of the LSTM's states in each direction.
        init_std: Standard deviation of all that the MLP starts from. By default slots and weights are drawn as torch
            draws them, and as HF PEFT does; NeMo's 0.023 starts from a table that is nearly zero, and learns slowly.
            The LSTM is always drawn as torch draws it.
        placement: ``prefix`` (after BOS), ``before_bos`` (HF PEFT's place) or ``template`` (where a prompt template
            says ``{virtual:NAME}``).
        encoder: ``mlp``, or ``lstm``: bidirectional, of two layers, with two linears on top.
        tasks: Number of virtual tokens of each task; a row's field ``task`` picks its prompt. Each task has an encoder
            of its own.
    """

    default_lr = 1e-3

    def __init__(
        self,
        name: str = "ptuning",
        virtual_tokens: int = VIRTUAL_TOKENS,
        embedding_dim: int = 1024,
        bottleneck_dim: int = 1024,
        init_std: Optional[float] = None,
        placement: str = "prefix",
        encoder: str = "mlp",
        tasks: Optional[dict[str, int]] = None,
    ) -> None:
        super().__init__(name)
        self.embedding_dim = self.count("embedding_dim", embedding_dim)
        self.bottleneck_dim = self.count("bottleneck_dim", bottleneck_dim)
        self.init_std = None if init_std is None else self.positive("init_std", init_std)
        self.encoder = self.one_of("encoder", encoder, ENCODERS)
        self.place(virtual_tokens, placement, tasks)
        if encoder == "lstm":
            self.default_lr = LSTM_LR

    def table(self, birth: Birth, base: nn.Module, slot: PromptSlot, host: Host) -> PromptTable:
        """Return an encoder over the slots of one prompt."""
        made = {"mlp": MLPPrompt, "lstm": LSTMPrompt}[self.encoder]
        return made(birth, base, slot, self, host.config.hidden_size)


def _uniform(bound: float) -> Initializer:
    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return fill
