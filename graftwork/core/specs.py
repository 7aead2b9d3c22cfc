"""The layer specification of a decoder: transformer-engine's with CUDA, ours elsewhere, with equal parameter names.

megatron-core annotates its submodules more narrowly than it fills them itself: those arguments are left unchecked.
"""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
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
from graftwork.errors import ConfigError


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
    norm = _engine_norm() if engine else TorchNorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)  # type: ignore[arg-type]


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
    qk_norm = TorchNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=LayerNormColumnParallelLinear,
        core_attention=SDPACoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    submodules = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        pre_mlp_layernorm=TorchNorm if num_experts else IdentityOp,
        mlp=get_mlp_module_spec_for_backend(
            backend=FusedNormProvider(), num_experts=num_experts, moe_grouped_gemm=False
        ),
        mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _engine_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
    )


def _engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
