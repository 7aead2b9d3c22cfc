"""Shape: every number that defines a decoder-only transformer, and the arithmetic that follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Optional, TypedDict

from megatron.core.transformer import TransformerConfig

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.models.transformer_config import ACTIVATIONS, transformer_config

CHOICES = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "activation": ("swiglu", "gelu", "gelu_tanh", "squared_relu"),
    "position_embedding": ("rope", "learned"),
}
GATED = ("swiglu", "geglu_tanh")
"""Activations of a gate that stands beside the up projection."""
SAME_NAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm"),
    *("add_bias_linear", "add_qkv_bias", "hidden_dropout", "attention_dropout"),
)
"""Fields that TransformerConfig knows under the same name."""
OF_EXPERTS = (
    *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_layer_freq"),
)
"""Those of a mixture of experts."""
LARGEST, MOST_HEADS = 10**12, 4096
"""No size is larger; divisors up to here are offered where a number does not divide another."""
RANGES = {
    "layernorm_epsilon": (0.0, 1.0),
    "rotary_base": (1.0, 1e12),
    "rotary_percent": (1e-6, 1.0),
    "rope_scaling_factor": (1.0, 1e6),
    "hidden_dropout": (0.0, 0.999),
    "attention_dropout": (0.0, 0.999),
}
"""Smallest and largest value of each field that is no whole number."""


class GPTArguments(TypedDict):
    """Keyword arguments of ``core.gpt.build_gpt`` that describe a model outside its transformer layers."""

    vocab_size: int
    real_vocab_size: int
    max_sequence_length: int
    position_embedding_type: Literal["rope", "learned_absolute"]
    rotary_base: float
    rotary_percent: float
    rope_scaling_factor: Optional[float]
    share_embeddings_and_output_weights: bool


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer, without weights, devices or parallel sizes.

    ``family`` is the Hugging Face ``model_type``: it names who reads and writes the weights and is checked where the
    families are known. ``num_query_groups`` and ``kv_channels`` default to plain multi-head attention.
    ``rope_scaling_factor`` is the LLaMA 3.1 frequency scaling. In a mixture ``moe_router_topk`` of the experts see a
    token (default 2), each ``moe_ffn_hidden_size`` wide (default ``ffn_hidden_size``), with softmax over the logits of
    the chosen, or over all logits before the choice (``moe_router_pre_softmax``: their weights do not add up to 1);
    beside them an expert of ``moe_shared_expert_intermediate_size`` may see every token, weighted by a sigmoid
    (``moe_shared_expert_gate``). ``moe_layer_freq`` has a 1 for every layer that is a mixture and a 0 for one whose MLP
    is ``ffn_hidden_size`` wide (None: all are mixtures). ``sliding_window`` is that of the published model, without an
    effect on rows of at most ``max_position_embeddings``. Raises ConfigError for a value that cannot work.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = CHOICES
    """Valid values of each field that is a name."""
    undivided: ClassVar[bool] = False
    """Whether layers and sequences must stay whole on a rank: no pipeline or context parallelism."""
    from_zero: ClassVar[frozenset[str]] = frozenset()
    """Whole numbers that may be 0."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    family: str = "llama"
    num_query_groups: Optional[int] = None
    kv_channels: Optional[int] = None
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    activation: str = "swiglu"
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    position_embedding: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling_factor: Optional[float] = None
    tie_embeddings: bool = False
    qk_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    num_moe_experts: Optional[int] = None
    moe_router_topk: Optional[int] = None
    moe_ffn_hidden_size: Optional[int] = None
    moe_router_pre_softmax: bool = False
    moe_shared_expert_intermediate_size: Optional[int] = None
    moe_shared_expert_gate: bool = False
    moe_layer_freq: Optional[list[int]] = None
    sliding_window: Optional[int] = None

    def __post_init__(self) -> None:
        """Fill what follows from other fields, then refuse what cannot work."""
        self._check_choices()
        self._check_sizes()
        self._check_numbers()
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.kv_channels is None:
            self._check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        self._check_divides("num_query_groups", self.groups, "num_attention_heads", self.num_attention_heads)
        self._check_rotated()
        self._check_shared_expert()
        self._check_mixtures()
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise ConfigError(
                f"Shape.sliding_window={self.sliding_window} would have an effect on rows of "
                f"max_position_embeddings={self.max_position_embeddings}; a context of at most the window is valid."
            )
        if self.num_moe_experts is not None:
            self._complete_experts(self.num_moe_experts)

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def channels(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether fc1 holds a gate beside the up projection."""
        return self.activation in GATED

    @property
    def expert_width(self) -> int:
        """Width of one expert of a mixture."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def mixtures(self) -> int:
        """Number of layers that are a mixture of experts."""
        if self.num_moe_experts is None:
            return 0
        return self.num_layers if self.moe_layer_freq is None else sum(self.moe_layer_freq)

    @property
    def qkv_bias(self) -> bool:
        """Whether the fused qkv projection has a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    def padded_vocab_size(self, tensor_parallel: int = 1, multiple: int = 1) -> int:
        """Smallest multiple of ``tensor_parallel * multiple`` that holds the vocabulary."""
        step = tensor_parallel * multiple
        return -(-self.vocab_size // step) * step

    def total_parameters(self) -> int:
        """Number of parameters of the whole model, vocabulary padding left out, tied weights counted once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        positions = self.max_position_embeddings * self.hidden_size if self.position_embedding == "learned" else 0
        mixtures = self.mixtures * self._layer_parameters(mixture=True)
        dense = (self.num_layers - self.mixtures) * self._layer_parameters()
        return embeddings + positions + mixtures + dense + self._norm(self.hidden_size)

    def transformer_config(self, **given: object) -> TransformerConfig:
        """Return megatron-core's configuration; ``given``: any TransformerConfig field (sizes, dtype, recompute).

        Raises ParallelismError when the sizes do not fit, ConfigError for an unknown field.
        """
        return transformer_config(self, self._transformer_fields(), given)

    def gpt_arguments(self, tensor_parallel: int = 1) -> GPTArguments:
        """Return what ``core.gpt.build_gpt`` must know of the model outside its transformer layers."""
        return {
            "vocab_size": self.padded_vocab_size(tensor_parallel),
            "real_vocab_size": self.vocab_size,
            "max_sequence_length": self.max_position_embeddings,
            "position_embedding_type": "rope" if self.position_embedding == "rope" else "learned_absolute",
            "rotary_base": self.rotary_base,
            "rotary_percent": self.rotary_percent,
            "rope_scaling_factor": self.rope_scaling_factor,
            "share_embeddings_and_output_weights": self.tie_embeddings,
        }

    def _transformer_fields(self) -> dict[str, object]:
        own: dict[str, object] = {name: getattr(self, name) for name in SAME_NAME}
        own |= {"gated_linear_unit": self.gated, "activation_func": ACTIVATIONS[self.activation]}
        if self.num_moe_experts is None:
            return own
        own |= {name: getattr(self, name) for name in OF_EXPERTS} | {"moe_token_dispatcher_type": "alltoall"}
        return own | ({"moe_layer_freq": 1} if self.moe_layer_freq is None else {})

    def _layer_parameters(self, mixture: bool = False) -> int:
        heads, groups, width = self.num_attention_heads, self.groups, self.channels
        qkv = self._linear(self.hidden_size, (heads + 2 * groups) * width, self.qkv_bias)
        out = self._linear(heads * width, self.hidden_size, self.add_bias_linear)
        qk_norms = 2 * self._norm(width) if self.qk_layernorm else 0
        mlp = self._mixture_parameters() if mixture else self._ffn(self.ffn_hidden_size)
        return 2 * self._norm(self.hidden_size) + qkv + out + qk_norms + mlp

    def _mixture_parameters(self) -> int:
        routed = (self.num_moe_experts or 0) * (self.hidden_size + self._ffn(self.expert_width))
        if self.moe_shared_expert_intermediate_size is None:
            return routed
        gate = self.hidden_size if self.moe_shared_expert_gate else 0
        return routed + self._ffn(self.moe_shared_expert_intermediate_size) + gate

    def _ffn(self, width: int) -> int:
        up = self._linear(self.hidden_size, width * (2 if self.gated else 1), self.add_bias_linear)
        return up + self._linear(width, self.hidden_size, self.add_bias_linear)

    def _norm(self, width: int) -> int:
        return width * (2 if self.normalization == "LayerNorm" else 1)

    @staticmethod
    def _linear(inputs: int, outputs: int, bias: bool) -> int:
        return outputs * (inputs + bias)

    def _check_choices(self) -> None:
        for field, valid in self.choices.items():
            value = getattr(self, field)
            if value not in valid:
                raise ConfigError(f"Shape.{field} is {quoted(value)}; {suggest(str(value)[:100], valid)}")

    def _check_sizes(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            absent = value is None and field.type == Optional[int]
            least = 0 if field.name in self.from_zero else 1
            if field.type in (int, Optional[int]) and not absent and (type(value) is not int or value < least):
                raise ConfigError(
                    f"Shape.{field.name} is {quoted(value)}; a whole number of at least {least} is valid."
                )
            if type(value) is int and value > LARGEST:
                raise ConfigError(f"Shape.{field.name} is {quoted(value)}; a whole number up to {LARGEST:,} is valid.")
            if field.type is bool and type(value) is not bool:
                raise ConfigError(f"Shape.{field.name} is {quoted(value)}; True or False is valid.")

    def _check_numbers(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is None and name == "rope_scaling_factor":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                raise ConfigError(f"Shape.{name} is {quoted(value)}; a number from {least:g} to {most:g} is valid.")

    def _complete_experts(self, experts: int) -> None:
        chosen = 2 if self.moe_router_topk is None else self.moe_router_topk
        least = 1 if self.moe_router_pre_softmax else 2
        if experts < least:
            raise ConfigError(f"Shape.num_moe_experts is {experts}; at least {least} is valid, None for a dense model.")
        if not least <= chosen <= experts:
            why = "" if least == 1 else ", for the softmax over the logits of one expert is 1 and trains no router"
            raise ConfigError(
                f"Shape.moe_router_topk is {chosen}; a number from {least} to num_moe_experts={experts} is valid{why}."
            )
        object.__setattr__(self, "moe_router_topk", chosen)
        object.__setattr__(self, "moe_ffn_hidden_size", self.expert_width)

    def _check_shared_expert(self) -> None:
        shared = self.moe_shared_expert_intermediate_size
        if shared is None and self.moe_shared_expert_gate:
            raise ConfigError(
                "Shape.moe_shared_expert_gate=True needs moe_shared_expert_intermediate_size; it is None."
            )
        if shared is not None and (self.num_moe_experts is None or self.add_bias_linear):
            raise ConfigError(
                f"Shape.moe_shared_expert_intermediate_size={shared} needs num_moe_experts and add_bias_linear=False; "
                f"they are {self.num_moe_experts} and {self.add_bias_linear}."
            )

    def _check_mixtures(self) -> None:
        chosen = self.moe_layer_freq
        if chosen is None:
            return
        listed = isinstance(chosen, (list, tuple)) and len(chosen) == self.num_layers
        if not listed or not all(type(one) is int and one in (0, 1) for one in chosen):
            raise ConfigError(
                f"Shape.moe_layer_freq is {quoted(chosen)}; a list of {self.num_layers} numbers is valid, 1 for a "
                "layer that is a mixture and 0 for one that is not, or None."
            )
        if self.num_moe_experts is None or not any(chosen):
            raise ConfigError(
                f"Shape.moe_layer_freq needs num_moe_experts and a 1 for at least one layer; num_moe_experts is "
                f"{self.num_moe_experts}."
            )
        # one way to say it: a list, as JSON has it, and None where it would say nothing
        object.__setattr__(self, "moe_layer_freq", None if all(chosen) else list(chosen))

    def _check_rotated(self) -> None:
        rotated = int(self.channels * self.rotary_percent)
        if self.position_embedding == "rope" and (rotated < 2 or rotated % 2):
            raise ConfigError(
                f"rotary positions turn pairs of channels, but {rotated} of {self.channels} channels of a head are "
                "rotated; choose Shape.kv_channels and Shape.rotary_percent so that they are 2, 4, 6, ..."
            )

    @staticmethod
    def _check_divides(small_name: str, small: int, large_name: str, large: int) -> None:
        if large % small:
            divisors = [n for n in range(1, min(large, MOST_HEADS) + 1) if large % n == 0]
            raise ConfigError(
                f"Shape.{small_name}={quoted(small)} must divide {large_name}={quoted(large)}; valid: "
                f"{quoted(str(divisors), 300, bare=True)}."
            )
