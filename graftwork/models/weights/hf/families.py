"""The mapping of each model family: one table per family, built from a Shape."""

from collections.abc import Callable

from graftwork import parallel
from graftwork.errors import ConfigError
from graftwork.models.shapes.shape import Shape
from graftwork.models.weights.mapping import Mapping, Rule
from graftwork.models.weights.ops import QKV, Copy, Fused, Gated, Op, Transposed
from graftwork.parallel.sharding import Sharding

LAYER = "decoder.layers.{layer}."
QKV_CORE, PROJ_CORE = LAYER + "self_attention.linear_qkv.", LAYER + "self_attention.linear_proj."
FC1_CORE, FC2_CORE = LAYER + "mlp.linear_fc1.", LAYER + "mlp.linear_fc2."


def mapping_for(shape: Shape, tensor_parallel: int | None = None) -> Mapping:
    """Return the mapping of ``shape``; ``tensor_parallel`` sets the vocabulary padding (None: the current size).

    Raises ConfigError for mixture-of-experts shapes, which have no mapping.
    """
    if shape.num_moe_experts is not None:
        raise ConfigError("mixture-of-experts checkpoints have no weight mapping; num_moe_experts=None is valid.")
    padded = shape.padded_vocab_size(_current_size() if tensor_parallel is None else tensor_parallel)
    return _FAMILIES[shape.family](shape, padded)


def _current_size() -> int:
    return parallel.tp_size() if parallel.is_initialized() else 1


def _llama(shape: Shape, padded: int) -> Mapping:
    """LLaMA, Mistral, Qwen and Nemotron: separate q/k/v (and gate/up), names under ``model.``."""
    layer, attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    qkv = tuple(f"{attention}{x}_proj" for x in "qkv")
    fc1 = tuple(f"{layer}mlp.{x}_proj" for x in (("gate", "up") if shape.gated else ("up",)))
    rules = (
        *_vocabulary(shape, padded, "model.embed_tokens.weight"),
        *_norm(shape, QKV_CORE + "layer_norm_", layer + "input_layernorm."),
        *_pair(QKV_CORE, qkv, lambda tail: _qkv(shape, tail), (shape.hidden_size,), shape.qkv_bias),
        *_qk_norms(shape, attention),
        *_row(PROJ_CORE, attention + "o_proj", shape, _attention_width(shape)),
        *_norm(shape, FC1_CORE + "layer_norm_", layer + "post_attention_layernorm."),
        *_pair(FC1_CORE, fc1, lambda tail: _fc1(shape, tail), (shape.hidden_size,), shape.add_bias_linear),
        *_row(FC2_CORE, layer + "mlp.down_proj", shape, shape.ffn_hidden_size),
        *_norm(shape, "decoder.final_layernorm.", "model.norm."),
        _output(shape, padded, "model.embed_tokens.weight"),
    )
    return Mapping(shape.family, shape.num_layers, rules, "model.", (r"rotary_emb\.inv_freq$", *_tied_head(shape)))


def _gpt2(shape: Shape, padded: int) -> Mapping:
    """GPT-2 and GPT-3: fused ``c_attn``, Conv1D weights stored [in, out], learned positions."""
    layer, hidden = "transformer.h.{layer}.", shape.hidden_size
    positions = Copy(Sharding((shape.max_position_embeddings, hidden)))
    rules = (
        *_vocabulary(shape, padded, "transformer.wte.weight"),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",), positions),
        *_norm(shape, QKV_CORE + "layer_norm_", layer + "ln_1."),
        *_conv1d(QKV_CORE, layer + "attn.c_attn", lambda tail: Fused(_qkv(shape, tail)), (hidden,)),
        *_conv1d_row(PROJ_CORE, layer + "attn.c_proj", shape, _attention_width(shape)),
        *_norm(shape, FC1_CORE + "layer_norm_", layer + "ln_2."),
        *_conv1d(FC1_CORE, layer + "mlp.c_fc", lambda tail: _fc1(shape, tail), (hidden,)),
        *_conv1d_row(FC2_CORE, layer + "mlp.c_proj", shape, shape.ffn_hidden_size),
        *_norm(shape, "decoder.final_layernorm.", "transformer.ln_f."),
        _output(shape, padded, "transformer.wte.weight"),
    )
    ignored = (r"\.attn\.(masked_)?bias$", *_tied_head(shape))
    return Mapping(shape.family, shape.num_layers, rules, "transformer.", ignored)


_FAMILIES: dict[str, Callable[[Shape, int], Mapping]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "nemotron"), _llama),
    "gpt2": _gpt2,
}


def _attention_width(shape: Shape) -> int:
    return shape.num_attention_heads * shape.channels


def _qkv(shape: Shape, tail: tuple[int, ...]) -> QKV:
    return QKV(shape.num_attention_heads, shape.groups, shape.channels, tail)


def _fc1(shape: Shape, tail: tuple[int, ...]) -> Op:
    if shape.gated:
        return Gated(shape.ffn_hidden_size, tail)
    return Copy(Sharding((shape.ffn_hidden_size, *tail), dim=0))


def _vocab_op(shape: Shape, padded: int) -> Copy:
    return Copy(Sharding((shape.vocab_size, shape.hidden_size), dim=0, padded=padded))


def _vocabulary(shape: Shape, padded: int, name: str) -> tuple[Rule, ...]:
    return (Rule("embedding.word_embeddings.weight", (name,), _vocab_op(shape, padded)),)


def _output(shape: Shape, padded: int, embedding: str) -> Rule:
    # A tied model has its own output copy on the last pipeline stage.
    name = embedding if shape.tie_embeddings else "lm_head.weight"
    return Rule("output_layer.weight", (name,), _vocab_op(shape, padded), alias=shape.tie_embeddings)


def _tied_head(shape: Shape) -> tuple[str, ...]:
    return (r"^lm_head\.weight$",) if shape.tie_embeddings else ()


def _norm(shape: Shape, core: str, hf: str, width: int | None = None) -> tuple[Rule, ...]:
    names = ("weight", "bias") if shape.normalization == "LayerNorm" else ("weight",)
    op = Copy(Sharding((width or shape.hidden_size,)))
    return tuple(Rule(core + name, (hf + name,), op) for name in names)


def _qk_norms(shape: Shape, attention: str) -> tuple[Rule, ...]:
    if not shape.qk_layernorm:
        return ()
    core = LAYER + "self_attention."
    query = _norm(shape, core + "q_layernorm.", attention + "q_norm.", shape.channels)
    return (*query, *_norm(shape, core + "k_layernorm.", attention + "k_norm.", shape.channels))


def _pair(
    core: str, hf: tuple[str, ...], op: Callable[[tuple[int, ...]], Op], tail: tuple[int, ...], bias: bool
) -> tuple[Rule, ...]:
    """Weight and, if any, bias of a column-parallel linear: the same operation with and without its input dimension."""
    weight = Rule(core + "weight", tuple(f"{name}.weight" for name in hf), op(tail))
    return (weight, Rule(core + "bias", tuple(f"{name}.bias" for name in hf), op(()))) if bias else (weight,)


def _row(core: str, hf: str, shape: Shape, inputs: int) -> tuple[Rule, ...]:
    """Weight [h, inputs] cut along its inputs and, if any, a replicated bias."""
    weight = Rule(core + "weight", (hf + ".weight",), Copy(Sharding((shape.hidden_size, inputs), dim=1)))
    bias = Rule(core + "bias", (hf + ".bias",), Copy(Sharding((shape.hidden_size,))))
    return (weight, bias) if shape.add_bias_linear else (weight,)


def _conv1d(core: str, hf: str, op: Callable[[tuple[int, ...]], Op], tail: tuple[int, ...]) -> tuple[Rule, ...]:
    return tuple(_stored_transposed(rule) for rule in _pair(core, (hf,), op, tail, bias=True))


def _conv1d_row(core: str, hf: str, shape: Shape, inputs: int) -> tuple[Rule, ...]:
    return tuple(_stored_transposed(rule) for rule in _row(core, hf, shape, inputs))


def _stored_transposed(rule: Rule) -> Rule:
    return Rule(rule.core, rule.hf, Transposed(rule.op)) if rule.core.endswith("weight") else rule
