"""What T5 and mT5 share: the spelling of their sizes, and their tensors in two stacks of blocks."""

from typing import TypeGuard

from graftwork.errors import CheckpointError, quoted
from graftwork.models.shape import Shape
from graftwork.models.t5_shape import T5Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.family import Config, Family, ShapeFields, flag, number
from graftwork.models.weights.mapping import Mapping, Rule
from graftwork.models.weights.ops import Copy
from graftwork.parallel.sharding import Sharding

ACTIVATIONS = {
    "relu": ("relu", "relu", False),
    "gelu": ("gelu", "gelu", False),
    "gelu_new": ("gelu_tanh", "gelu_new", False),
    "gated-gelu": ("geglu_tanh", "gelu_new", True),
    "gated-silu": ("swiglu", "silu", True),
}
"""By ``feed_forward_proj``: Shape's activation, and what transformers writes beside it (``dense_act_fn``, gated)."""
BIAS, EMBEDDING, HEAD = "layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight", "lm_head.weight"


class T5Like(Family):
    """RMSNorm without biases, relative positions in block 0, separate projections, an encoder and a decoder."""

    kind = "t5"
    shape_class = T5Shape
    aliases = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    used = frozenset(
        {
            *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
            *("relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate"),
            *("layer_norm_epsilon", "feed_forward_proj", "tie_word_embeddings", "decoder_start_token_id"),
        }
    )
    fixed = {"is_encoder_decoder": (None, True)}
    irrelevant = {
        "is_decoder": "each stack sets its own",
        "initializer_factor": "spread of random weights",
        "classifier_dropout": "belongs to a classifier",
    }
    defaults = {
        "d_kv": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
    }

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields; transformers has no place for two different dropouts."""
        dropout = number(config, "dropout_rate")
        return {
            "num_layers": config["num_layers"],
            "num_decoder_layers": config.get("num_decoder_layers"),
            "hidden_size": config["d_model"],
            "kv_channels": config["d_kv"],
            "ffn_hidden_size": config["d_ff"],
            "num_attention_heads": config["num_heads"],
            "vocab_size": config["vocab_size"],
            "activation": _activation(config),
            "layernorm_epsilon": number(config, "layer_norm_epsilon"),
            "relative_attention_num_buckets": config["relative_attention_num_buckets"],
            "relative_attention_max_distance": config["relative_attention_max_distance"],
            "tie_embeddings": flag(config, "tie_word_embeddings", True),
            "hidden_dropout": dropout,
            "attention_dropout": dropout,
            **_start(config),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields."""
        assert is_t5(shape)
        (proj,) = (proj for proj, (activation, *_) in ACTIVATIONS.items() if activation == shape.activation)
        return {
            "is_encoder_decoder": True,
            "num_layers": shape.num_layers,
            "num_decoder_layers": shape.decoder_layers,
            "d_model": shape.hidden_size,
            "d_kv": shape.channels,
            "d_ff": shape.ffn_hidden_size,
            "num_heads": shape.num_attention_heads,
            "feed_forward_proj": proj,
            "layer_norm_epsilon": shape.layernorm_epsilon,
            "relative_attention_num_buckets": shape.relative_attention_num_buckets,
            "relative_attention_max_distance": shape.relative_attention_max_distance,
            "dropout_rate": shape.hidden_dropout,
            "decoder_start_token_id": shape.decoder_start_token_id,
        }

    def mapping(self, shape: Shape, padded: int) -> Mapping:
        """Return the rules of T5's tensor names; its files may repeat the embeddings under each stack."""
        assert is_t5(shape)
        return Mapping(
            family=self.name,
            layers={"encoder": shape.num_layers, "decoder": shape.decoder_layers},
            rules=(
                rules.embedding(shape, padded, EMBEDDING),
                *(_bias(shape, stack) for stack in ("encoder", "decoder")),
                *rules.of_encoder(_layer(shape, "encoder.block.{layer}.", "layer.1.")),
                *rules.of_encoder(rules.norm(shape, rules.FINAL_NORM, "encoder.final_layer_norm.")),
                *_layer(shape, "decoder.block.{layer}.", "layer.2."),
                *_cross(shape, "decoder.block.{layer}.layer.1."),
                *rules.norm(shape, rules.FINAL_NORM, "decoder.final_layer_norm."),
                rules.output(shape, padded, EMBEDDING, head=HEAD),
            ),
            # The first checkpoints hold a table that no model has.
            ignored=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
            twins={
                **{f"{stack}.embed_tokens.weight": EMBEDDING for stack in ("encoder", "decoder")},
                **rules.tied_head(shape, HEAD, EMBEDDING),
            },
        )


def is_t5(shape: Shape) -> TypeGuard[T5Shape]:
    """Tell whether a shape has the fields of an encoder-decoder."""
    return isinstance(shape, T5Shape)


def _layer(shape: T5Shape, block: str, mlp: str) -> tuple[Rule, ...]:
    """Return the rules of self-attention and MLP of a decoder's layer."""
    attention, dense = block + "layer.0.SelfAttention.", block + mlp + "DenseReluDense."
    fc1 = ("wi_0", "wi_1") if shape.gated else ("wi",)
    return (
        *rules.norm(shape, rules.QKV_NORM, block + "layer.0.layer_norm."),
        *rules.qkv(shape, *(f"{attention}{x}." for x in "qkv")),
        *rules.attention_output(shape, attention + "o."),
        *rules.norm(shape, rules.FC1_NORM, block + mlp + "layer_norm."),
        *rules.fc1(shape, *(f"{dense}{x}." for x in fc1)),
        *rules.fc2(shape, dense + "wo."),
    )


def _cross(shape: T5Shape, layer: str) -> tuple[Rule, ...]:
    """Return the rules of a layer's attention to the encoder."""
    return (
        *rules.norm(shape, rules.CROSS_NORM, layer + "layer_norm."),
        *rules.cross_attention(shape, *(f"{layer}EncDecAttention.{x}." for x in "qkvo")),
    )


def _bias(shape: T5Shape, stack: str) -> Rule:
    """Return the rule of a stack's table of relative positions, which its first block holds for all of them."""
    table = Copy(Sharding((shape.relative_attention_num_buckets, shape.num_attention_heads)))
    return Rule(f"{stack}_relative_pos_emb.relative_attention_bias.weight", (f"{stack}.block.0.{BIAS}",), table)


def _activation(config: Config) -> str:
    """Return Shape's activation; what transformers derives from the same field, and prefers, must say the same."""
    proj = config["feed_forward_proj"]
    if not isinstance(proj, str) or proj not in ACTIVATIONS:
        valid = ", ".join(map(repr, ACTIVATIONS))
        raise CheckpointError(f"feed_forward_proj={quoted(proj)} of config.json is not supported; valid: {valid}.")
    activation, function, gated = ACTIVATIONS[proj]
    for field, value in (("dense_act_fn", function), ("is_gated_act", gated)):
        if config.get(field, value) != value:
            raise CheckpointError(
                f"{field}={quoted(config[field])} of config.json contradicts feed_forward_proj={proj!r}; "
                f"valid: {value!r}."
            )
    return activation


def _start(config: Config) -> ShapeFields:
    start = config.get("decoder_start_token_id")
    return {} if start is None else {"decoder_start_token_id": start}
