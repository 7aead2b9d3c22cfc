"""What the families of mixtures of experts share: LLaMA's layers, with a router and gated experts for an MLP."""

from dataclasses import replace
from typing import ClassVar

from graftwork.errors import CheckpointError, ConfigError, quoted
from graftwork.models.shape import Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.family import Config, ShapeFields
from graftwork.models.weights.hf.llama_like import LlamaLike
from graftwork.models.weights.mapping import Mapping, Rule, Stack


class MixtureLike(LlamaLike):
    """Layers that are mixtures, all of them or some; a softmax chooses the experts of a token.

    ``count``: the config's name for the number of experts; ``block``: what the mixture is called in a layer;
    ``linears``: what an expert's gate, up and down projections are called; ``some``: whether layers may have none.
    """

    mixture = True
    count: ClassVar[str] = "num_experts"
    block: ClassVar[str] = "mlp."
    linears: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    some: ClassVar[bool] = False
    irrelevant = {
        "output_router_logits": "says what else is returned, and adds a loss that is not trained here",
        "router_aux_loss_coef": "weighs a loss that is not trained here",
    }

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields of a model without biases."""
        return {
            **super().read(config),
            "num_moe_experts": whole(config, self.count),
            "moe_router_topk": whole(config, "num_experts_per_tok"),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields."""
        return {
            **super().write(shape),
            self.count: shape.num_moe_experts,
            "num_experts_per_tok": shape.moe_router_topk,
        }

    def mapping(self, shape: Shape, padded: int) -> Mapping:
        """Return the rules of LLaMA's tensor names; checkpoints may hold all experts of a layer in two tensors."""
        plain = super().mapping(shape, padded)
        first, second = (rule for rule in plain.rules if rule.of_expert)
        layer = "model.layers.{layer}."
        stacks = tuple(  # transformers calls every mixture "mlp" once its experts are stacked
            Stack(f"{layer}{self.block}experts.{name}", rule, f"{layer}mlp.experts.{name}")
            for name, rule in (("gate_up_proj", first), ("down_proj", second))
        )
        renamed = () if self.block == "mlp." else ((r"^(model\.layers\.\d+\.)mlp\.", rf"\1{self.block}"),)
        return replace(plain, experts=shape.num_moe_experts or 0, renamed=renamed, stacks=stacks)

    def mlp(self, shape: Shape, layer: str, norm: str) -> tuple[Rule, ...]:
        """Return the rules of a layer's router and experts, or of its MLP, and of the ``norm`` in front of them."""
        found = self.routed(shape, layer, norm)
        if shape.moe_layer_freq is None:
            return found
        if not self.some:
            raise ConfigError(
                f"no Hugging Face {self.name} model has moe_layer_freq={quoted(shape.moe_layer_freq)}; None is valid."
            )
        mixtures = frozenset(index for index, mixed in enumerate(shape.moe_layer_freq) if mixed)
        dense = frozenset(range(shape.num_layers)) - mixtures
        return (*rules.of_layers(found, mixtures), *rules.of_layers(super().mlp(shape, layer, norm), dense))

    def routed(self, shape: Shape, layer: str, norm: str) -> tuple[Rule, ...]:
        """Return the rules of a mixture and of the ``norm`` in front of it."""
        block = layer + self.block
        return (
            *rules.norm(shape, rules.MIXTURE_NORM, norm),
            *rules.mixture(
                shape, block + "gate.", *(f"{block}experts.{{expert}}.{linear}." for linear in self.linears)
            ),
        )


def whole(config: Config, field: str) -> int:
    """Return ``field``; raises CheckpointError unless it is a whole number."""
    value = config[field]
    if type(value) is not int:
        raise CheckpointError(f"{field}={quoted(value)} of config.json is not a whole number.")
    return value
