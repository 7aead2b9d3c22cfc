"""What Qwen's mixtures of experts share: which layers they are, and a router whose weights add up to 1, or do not."""

from graftwork.errors import CheckpointError, quoted
from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config, ShapeFields, flag
from graftwork.models.weights.hf.mixture_like import MixtureLike, whole

MOST_LAYERS = 4096
"""Layers are told apart one by one up to here."""


class QwenMoELike(MixtureLike):
    """Experts of a width of their own, in every layer or in some; ``norm_topk_prob``: whether weights add up to 1."""

    some = True
    used = MixtureLike.used | {
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers"),
    }
    fixed = {**MixtureLike.fixed, "mlp_bias": (None, False)}
    defaults = {**MixtureLike.defaults, "use_sliding_window": False, "decoder_sparse_step": 1}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields; softmax over all experts is softmax over the chosen once it is normalised."""
        return {
            **super().read(config),
            "moe_ffn_hidden_size": whole(config, "moe_intermediate_size"),
            "moe_router_pre_softmax": not flag(config, "norm_topk_prob", False),
            "moe_layer_freq": _mixtures(config),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields; layers without experts by their numbers."""
        return {
            **super().write(shape),
            "moe_intermediate_size": shape.moe_ffn_hidden_size,
            "norm_topk_prob": not shape.moe_router_pre_softmax,
            "mlp_only_layers": [index for index, mixed in enumerate(shape.moe_layer_freq or ()) if not mixed],
        }


def _mixtures(config: Config) -> list[int] | None:
    """Return a 1 for every layer that is a mixture and a 0 for the others; None where all are."""
    layers, step, plain = whole(config, "num_hidden_layers"), whole(config, "decoder_sparse_step"), _plain(config)
    if step < 1:
        raise CheckpointError(f"decoder_sparse_step={quoted(step)} of config.json is not supported; valid: 1, 2, ...")
    if step == 1 and not any(0 <= layer < layers for layer in plain):
        return None
    if layers > MOST_LAYERS:
        raise CheckpointError(f"num_hidden_layers={quoted(layers)} of config.json: at most {MOST_LAYERS} may differ.")
    found = [int(layer not in plain and (layer + 1) % step == 0) for layer in range(layers)]
    if not any(found):
        raise CheckpointError(
            f"decoder_sparse_step={quoted(step)} and mlp_only_layers={quoted(config.get('mlp_only_layers'))} of "
            "config.json leave no layer with experts; valid: at least one layer, or a model_type without experts."
        )
    return found


def _plain(config: Config) -> set[int]:
    """Return the layers that have an MLP whatever the step says."""
    value = config.get("mlp_only_layers")
    if value is None:
        return set()
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise CheckpointError(f"mlp_only_layers={quoted(value)} of config.json is no list of whole numbers.")
    return set(value)
