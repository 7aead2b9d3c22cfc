"""The layer specifications: a GPT's are transformer-engine's with CUDA, ours elsewhere, with equal parameter names.

megatron-core annotates its submodules more narrowly than it fills them itself: those arguments are left unchecked.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from graftwork.compat import transformer_engine
from graftwork.core.attention import SDPACoreAttention
from graftwork.core.layers import LayerNormColumnParallelLinear, TorchNorm
from graftwork.core.remembering import RememberingCrossAttention, RememberingSelfAttention
from graftwork.errors import ConfigError

BIAS_DROPOUT_ADD: Any = get_bias_dropout_add


class FusedNormProvider(LocalSpecProvider):
    """megatron-core's local modules, but with the norm inside the linear that follows it."""

    def fuse_layernorm_and_linear(self) -> bool:
        """Say that the norm stands inside the linear."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """Return the fused norm and linear."""
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_: bool) -> type:
        """Return the norm that stands alone."""
        return TorchNorm

    def core_attention(self) -> type:
        """Return the attention between query, key and value projections and the output projection."""
        return SDPACoreAttention


def gpt_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the specification of the layers that this pipeline stage builds, and of the final norm.

    The transformer-engine branch is written from megatron-core's source; it needs CUDA to run.
    """
    if config.moe_grouped_gemm:
        raise ConfigError("moe_grouped_gemm=True is not supported: experts are separate modules (SequentialMLP).")
    engine = transformer_engine.usable()
    if not engine:
        transformer_engine.name_absentees()
    make = _engine_layer if engine else _local_layer
    dense, experts = make(config, None), make(config, config.num_moe_experts)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [experts if has_experts else dense for has_experts in _expert_layers(config)[first : first + count]]
    return _block(layers, _engine_norm() if engine else TorchNorm)


def t5_block_specs(
    encoder_layers: int, config: TransformerConfig
) -> tuple[TransformerBlockSubmodules, TransformerBlockSubmodules]:
    """Return the specifications of T5's encoder and, with ``config.num_layers`` layers, of its decoder.

    They are ours with CUDA too: relative positions reach the attention as an additive mask that holds padding and
    causality as well, so that it is made once for all layers of a stack.
    """
    if not transformer_engine.usable():
        transformer_engine.name_absentees()
    encoder, decoder = (_local_submodules(config, None, RememberingSelfAttention, AttnMaskType.no_mask) for _ in "ed")
    decoder.pre_cross_attn_layernorm = TorchNorm
    decoder.cross_attn_bda = BIAS_DROPOUT_ADD
    decoder.cross_attention = ModuleSpec(
        module=RememberingCrossAttention,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=CrossAttentionSubmodules(
            linear_q=ColumnParallelLinear,
            linear_kv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    stacks = ((encoder, encoder_layers), (decoder, config.num_layers))
    first, second = (_block([ModuleSpec(module=TransformerLayer, submodules=one)] * n, TorchNorm) for one, n in stacks)
    return first, second


def _block(layers: list[ModuleSpec], final_norm: Any) -> TransformerBlockSubmodules:
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _expert_layers(config: TransformerConfig) -> list[bool]:
    """Return for every layer of the whole model whether its MLP is a mixture of experts."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    if len(frequency) != config.num_layers:
        raise ConfigError(f"moe_layer_freq has {len(frequency)} entries for {config.num_layers} layers.")
    return [bool(entry) for entry in frequency]


def _local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    submodules = _local_submodules(config, num_experts, SelfAttention, AttnMaskType.causal)
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _local_submodules(
    config: TransformerConfig, num_experts: int | None, attention: type[SelfAttention], mask: AttnMaskType
) -> TransformerLayerSubmodules:
    qk_norm = TorchNorm if config.qk_layernorm else IdentityOp
    inside = SelfAttentionSubmodules(
        linear_qkv=LayerNormColumnParallelLinear,
        core_attention=SDPACoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return TransformerLayerSubmodules(
        self_attention=ModuleSpec(module=attention, params={"attn_mask_type": mask}, submodules=inside),
        self_attn_bda=BIAS_DROPOUT_ADD,
        pre_mlp_layernorm=TorchNorm if num_experts else IdentityOp,
        mlp=get_mlp_module_spec_for_backend(
            backend=FusedNormProvider(), num_experts=num_experts, moe_grouped_gemm=False
        ),
        mlp_bda=BIAS_DROPOUT_ADD,
    )


def _engine_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
    )


def _engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
