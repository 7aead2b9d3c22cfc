"""What the families of LLaMA's layout share: the spelling of their sizes, and their tensors under ``model.``."""

from typing import ClassVar

from graftwork.errors import CheckpointError, quoted
from graftwork.models.shape import Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.family import Config, Family, ShapeFields, flag, number
from graftwork.models.weights.hf.rope import read_rope, write_rope
from graftwork.models.weights.mapping import Mapping, Rule

USED = frozenset(
    {
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "attention_dropout"),
        *("attention_bias", "mlp_bias", "sliding_window", "layer_types", "rope_parameters"),
    }
)
"""Fields that ``read_sizes``, ``linear_bias`` and ``read_rope`` read."""
FIXED = {"use_sliding_window": (None, False)}


class LlamaLike(Family):
    """Separate q, k, v (and gate, up) projections, rotary positions; RMSNorm and SwiGLU unless overridden.

    ``rotary_base``: transformers' own rope_theta for a config that has none; ``rotated``: its own part of each head
    that is rotated, None where that is always the whole; ``windowed``: whether its configs may have a sliding window in
    effect: then the context is the window, and within it the model is the published one.
    """

    rotary_base: ClassVar[float] = 10000.0
    rotated: ClassVar[float | None] = None
    windowed: ClassVar[bool] = False
    used = USED | {"rms_norm_eps"}
    fixed = {"hidden_act": ("silu",), **FIXED}
    defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields of a model with RMSNorm, SwiGLU and biases everywhere or nowhere."""
        return {
            **read_sizes(config, self.windowed),
            **read_rope(config, self.rotated, self.rotary_base),
            "layernorm_epsilon": number(config, "rms_norm_eps"),
            "add_bias_linear": linear_bias(config),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields of such a model, biases left out."""
        return {
            **write_sizes(shape),
            "hidden_act": "silu",
            "rms_norm_eps": shape.layernorm_epsilon,
            **({"sliding_window": shape.sliding_window} if self.windowed else {}),
            **write_rope(shape),
        }

    def mapping(self, shape: Shape, padded: int) -> Mapping:
        """Return the rules of LLaMA's tensor names."""
        layer, attention, embedding = "model.layers.{layer}.", "model.layers.{layer}.self_attn.", "model.embed_tokens."
        return Mapping(
            family=self.name,
            layers={"decoder": shape.num_layers},
            rules=(
                rules.embedding(shape, padded, embedding + "weight"),
                *rules.norm(shape, rules.QKV_NORM, layer + "input_layernorm."),
                *self.qkv(shape, attention),
                *rules.qk_norms(shape, attention + "q_norm.", attention + "k_norm."),
                *rules.attention_output(shape, attention + "o_proj."),
                *self.mlp(shape, layer, layer + "post_attention_layernorm."),
                *rules.norm(shape, rules.FINAL_NORM, "model.norm."),
                rules.output(shape, padded, embedding + "weight", head="lm_head.weight"),
            ),
            prefix="model.",
            ignored=(r"^(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",),
            twins=rules.tied_head(shape, "lm_head.weight", embedding + "weight"),
        )

    def qkv(self, shape: Shape, attention: str) -> tuple[Rule, ...]:
        """Return the rules of the qkv projection; ``attention`` is where names begin."""
        return rules.qkv(shape, *(f"{attention}{x}_proj." for x in "qkv"))

    def mlp(self, shape: Shape, layer: str, norm: str) -> tuple[Rule, ...]:
        """Return the rules of a layer's MLP and of the ``norm`` in front of it; ``layer`` is where names begin."""
        fc1 = ("gate", "up") if shape.gated else ("up",)
        return (
            *rules.norm(shape, rules.FC1_NORM, norm),
            *rules.fc1(shape, *(f"{layer}mlp.{x}_proj." for x in fc1)),
            *rules.fc2(shape, layer + "mlp.down_proj."),
        )


def read_sizes(config: Config, windowed: bool = False) -> ShapeFields:
    """Return sizes and dropout; raises CheckpointError for a window in effect, unless the context may be that short."""
    _refuse_kinds(config)
    if not windowed:
        _refuse_window(config)
    window = config.get("sliding_window") if windowed else None
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config.get("num_key_value_heads"),
        "kv_channels": config.get("head_dim"),
        "vocab_size": config["vocab_size"],
        **_context(config, window),
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
        "attention_dropout": number(config, "attention_dropout", 0.0),
    }


def write_sizes(shape: Shape) -> Config:
    """Return the config fields that ``read_sizes`` reads."""
    return {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_dropout": shape.attention_dropout,
    }


def linear_bias(config: Config) -> bool:
    """Return whether every linear has a bias; raises CheckpointError when attention and MLP differ."""
    attention, mlp = (flag(config, field, False) for field in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise CheckpointError("attention_bias and mlp_bias differ; both true or both false is supported.")
    return attention


def write_linear_bias(shape: Shape) -> Config:
    """Return the config fields that ``linear_bias`` reads."""
    return {"attention_bias": shape.add_bias_linear, "mlp_bias": shape.add_bias_linear}


def _context(config: Config, window: object) -> ShapeFields:
    """Return the longest row: that of the config, but no longer than a window."""
    longest = config["max_position_embeddings"]
    if window is None:
        return {"max_position_embeddings": longest}
    if type(window) is not int or window < 1:
        raise CheckpointError(f"sliding_window={quoted(window)} of config.json is not supported; valid: null, 1, ...")
    shortest = min(longest, window) if type(longest) is int else longest
    return {"max_position_embeddings": shortest, "sliding_window": window}


def _refuse_kinds(config: Config) -> None:
    """Raise CheckpointError for kinds of layers that do not see every earlier position."""
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * len(kinds if isinstance(kinds, list) else ()):
        raise CheckpointError(f"layer_types={quoted(kinds)} of config.json is not supported; valid: 'full_attention'.")


def _refuse_window(config: Config) -> None:
    """Raise CheckpointError for a window that some row would reach."""
    # Families that have the switch look at the window only when it is on.
    window = config.get("sliding_window") if config.get("use_sliding_window") is None else None
    if window is not None and number(config, "sliding_window") < number(config, "max_position_embeddings"):
        raise CheckpointError(
            f"sliding_window={quoted(window)} is not supported; valid: null, or at least max_position_embeddings "
            f"({quoted(config['max_position_embeddings'])})."
        )
