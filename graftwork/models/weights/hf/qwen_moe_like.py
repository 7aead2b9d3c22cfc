"""What Qwen's mixtures of experts share: the fields of a router whose weights add up to 1, or do not."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config, ShapeFields, flag
from graftwork.models.weights.hf.mixture_like import MixtureLike, whole


class QwenMoELike(MixtureLike):
    """Experts of a width of their own in every layer; ``norm_topk_prob`` says whether their weights add up to 1."""

    used = MixtureLike.used | {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
    fixed = {
        **MixtureLike.fixed,
        "decoder_sparse_step": (1,),
        "mlp_only_layers": (None, []),
        "mlp_bias": (None, False),
    }
    defaults = {**MixtureLike.defaults, "use_sliding_window": False, "decoder_sparse_step": 1}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields; softmax over all experts is softmax over the chosen once it is normalised."""
        return {
            **super().read(config),
            "moe_ffn_hidden_size": whole(config, "moe_intermediate_size"),
            "moe_router_pre_softmax": not flag(config, "norm_topk_prob", False),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields."""
        return {
            **super().write(shape),
            "moe_intermediate_size": shape.moe_ffn_hidden_size,
            "norm_topk_prob": not shape.moe_router_pre_softmax,
        }
