"""T5Shape: every number that defines an encoder-decoder of T5's kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Optional, TypedDict

from graftwork.errors import ConfigError, quoted
from graftwork.models.shape import LARGEST, Shape

FIXED: dict[str, tuple[object, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "num_moe_experts": (None,),
    "moe_router_pre_softmax": (False,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_shared_expert_gate": (False,),
}
"""Fields of a Shape in which all models of this kind agree, with their valid values."""
FEWEST_BUCKETS = 4
"""Two directions with a near and a far bucket each."""


class T5Arguments(TypedDict):
    """Keyword arguments of ``core.t5.build_t5`` that describe a model outside its transformer layers."""

    vocab_size: int
    real_vocab_size: int
    num_encoder_layers: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    share_embeddings_and_output_weights: bool
    scale_output: bool


@dataclass(frozen=True)
class T5Shape(Shape):
    """An encoder and a decoder of T5's kind: RMSNorm, no biases, relative positions without a limit.

    ``num_layers`` counts the encoder's layers, ``num_decoder_layers`` (None: as many) the decoder's. Each of the two
    has one table of ``relative_attention_num_buckets`` biases a head, which all distances from
    ``relative_attention_max_distance`` on share. ``scale_output`` (None: with ``tie_embeddings``, as in T5 1.0) divides
    what the output layer reads by the root of ``hidden_size``. The decoder starts with ``decoder_start_token_id``.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "normalization": ("RMSNorm",),
        "activation": ("relu", "geglu_tanh", "swiglu", "gelu", "gelu_tanh"),
        "position_embedding": ("relative",),
    }
    undivided: ClassVar[bool] = True
    from_zero: ClassVar[frozenset[str]] = frozenset({"decoder_start_token_id"})

    max_position_embeddings: int = LARGEST
    family: str = "t5"
    layernorm_epsilon: float = 1e-6
    activation: str = "relu"
    position_embedding: str = "relative"
    tie_embeddings: bool = True
    num_decoder_layers: Optional[int] = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    scale_output: Optional[bool] = None
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        """Fill what follows from other fields, then refuse what cannot work."""
        super().__post_init__()
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        if self.scale_output is None:
            object.__setattr__(self, "scale_output", self.tie_embeddings)
        for field, valid in FIXED.items():
            if getattr(self, field) not in valid:
                value = quoted(getattr(self, field))
                raise ConfigError(f"T5Shape.{field} is {value}; valid: {', '.join(map(repr, valid))}.")
        if self.groups != self.num_attention_heads:
            raise ConfigError(
                f"T5Shape.num_query_groups is {quoted(self.groups)}; num_attention_heads={self.num_attention_heads} "
                "is valid: every head has its own keys and values."
            )
        self._check_positions()
        self._check_output()

    @property
    def decoder_layers(self) -> int:
        """Number of the decoder's layers."""
        return self.num_decoder_layers or self.num_layers

    def total_parameters(self) -> int:
        """Number of parameters of the whole model, vocabulary padding left out, tied weights counted once."""
        tables = 2 * self.relative_attention_num_buckets * self.num_attention_heads
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        layer, norm = self._layer_parameters(), self._norm(self.hidden_size)
        cross = norm + 4 * self.hidden_size * self.num_attention_heads * self.channels
        layers = self.num_layers * layer + self.decoder_layers * (layer + cross)
        return tables + embeddings + layers + 2 * norm

    def t5_arguments(self, tensor_parallel: int = 1) -> T5Arguments:
        """Return what ``core.t5.build_t5`` must know of the model outside its transformer layers."""
        return {
            "vocab_size": self.padded_vocab_size(tensor_parallel),
            "real_vocab_size": self.vocab_size,
            "num_encoder_layers": self.num_layers,
            "relative_attention_num_buckets": self.relative_attention_num_buckets,
            "relative_attention_max_distance": self.relative_attention_max_distance,
            "share_embeddings_and_output_weights": self.tie_embeddings,
            "scale_output": bool(self.scale_output),
        }

    def _transformer_fields(self) -> dict[str, object]:
        # The configuration is the decoder's: T5 folds the scale of its scores into the weights.
        return {**super()._transformer_fields(), "num_layers": self.decoder_layers, "softmax_scale": 1.0}

    def _check_positions(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < FEWEST_BUCKETS:
            raise ConfigError(
                f"T5Shape.relative_attention_num_buckets is {buckets}; a whole number of at least {FEWEST_BUCKETS} "
                "is valid."
            )
        if distance <= buckets // 2:
            raise ConfigError(
                f"T5Shape.relative_attention_max_distance is {distance}; with {quoted(buckets)} buckets a whole number "
                f"of at least {quoted(buckets // 2 + 1)} is valid."
            )

    def _check_output(self) -> None:
        if type(self.scale_output) is not bool:
            raise ConfigError(f"T5Shape.scale_output is {quoted(self.scale_output)}; True, False or None is valid.")
        start, last = self.decoder_start_token_id, self.vocab_size - 1
        if start > last:
            raise ConfigError(f"T5Shape.decoder_start_token_id is {quoted(start)}; a token id up to {last} is valid.")
