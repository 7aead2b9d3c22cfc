"""Rules for the parameters that decoders and encoders have: a family says what its Hugging Face tensors are called.

Names end in a dot where ``weight`` and ``bias`` follow; ``{layer}`` and ``{expert}`` in them stand for their indices.
"""

from collections.abc import Callable
from dataclasses import replace

from graftwork.models.shape import Shape
from graftwork.models.weights.mapping import Rule
from graftwork.models.weights.ops import KV, QKV, Copy, Fused, Gated, Op, Transposed, Whole
from graftwork.parallel.sharding import Sharding

ATTENTION, MLP = "decoder.layers.{layer}.self_attention.", "decoder.layers.{layer}.mlp."
QKV_NORM, FC1_NORM = ATTENTION + "linear_qkv.layer_norm_", MLP + "linear_fc1.layer_norm_"
MIXTURE_NORM = "decoder.layers.{layer}.pre_mlp_layernorm."
EXPERT, SHARED = MLP + "experts.local_experts.{expert}.", MLP + "shared_experts."
FINAL_NORM = "decoder.final_layernorm."
CROSS, CROSS_NORM = "decoder.layers.{layer}.cross_attention.", "decoder.layers.{layer}.pre_cross_attn_layernorm."

Tail = tuple[int, ...]
"""The input dimension of a linear's weight, or nothing for its bias."""


def embedding(shape: Shape, padded: int, hf: str) -> Rule:
    """Return the rule of the word embeddings [v, h], padded to ``padded`` rows; ``hf`` is the whole name."""
    return Rule("embedding.word_embeddings.weight", (hf,), _vocabulary(shape, padded))


def positions(shape: Shape, hf: str) -> Rule:
    """Return the rule of learned position embeddings [s, h]; ``hf`` is the whole name."""
    table = Copy(Sharding((shape.max_position_embeddings, shape.hidden_size)))
    return Rule("embedding.position_embeddings.weight", (hf,), table)


def output(shape: Shape, padded: int, embedding: str, head: str) -> Rule:
    """Return the rule of the output layer: ``head``, or ``embedding`` again when the two are tied."""
    # A tied model has its own output copy on the last pipeline stage.
    name = embedding if shape.tie_embeddings else head
    return Rule("output_layer.weight", (name,), _vocabulary(shape, padded), alias=shape.tie_embeddings)


def tied_head(shape: Shape, head: str, embedding: str) -> dict[str, str]:
    """Return the redundant ``head`` that some checkpoints of tied models carry, for Mapping.twins."""
    return {head: embedding} if shape.tie_embeddings else {}


def norm(shape: Shape, core: str, hf: str, width: int | None = None) -> tuple[Rule, ...]:
    """Return the rules of a norm over ``width`` channels (None: the hidden size), with a bias if it is a LayerNorm."""
    names = ("weight", "bias") if shape.normalization == "LayerNorm" else ("weight",)
    op = Copy(Sharding((width or shape.hidden_size,)))
    return tuple(Rule(core + name, (hf + name,), op) for name in names)


def qk_norms(shape: Shape, query: str, key: str) -> tuple[Rule, ...]:
    """Return the rules of the norms of each head's query and key, none for a shape without them."""
    if not shape.qk_layernorm:
        return ()
    norms = ((ATTENTION + "q_layernorm.", query), (ATTENTION + "k_layernorm.", key))
    return tuple(rule for core, hf in norms for rule in norm(shape, core, hf, shape.channels))


def qkv(shape: Shape, query: str, key: str, value: str) -> tuple[Rule, ...]:
    """Return the rules of the qkv projection out of three tensors."""
    return column(shape, ATTENTION + "linear_qkv.", (query, key, value), _qkv_op(shape), shape.qkv_bias)


def fused_qkv(shape: Shape, hf: str) -> tuple[Rule, ...]:
    """Return the rules of the qkv projection out of one tensor that holds all queries, then keys, then values."""
    one = _qkv_op(shape)
    return column(shape, ATTENTION + "linear_qkv.", (hf,), lambda tail: Fused(one(tail)), shape.qkv_bias)


def attention_output(shape: Shape, hf: str) -> tuple[Rule, ...]:
    """Return the rules of the attention's output projection."""
    return row(shape, ATTENTION + "linear_proj.", hf, shape.num_attention_heads * shape.channels)


def cross_attention(shape: Shape, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """Return the rules of a decoder's attention to the encoder's output."""
    heads, width, bias = shape.num_attention_heads, shape.channels, shape.add_bias_linear

    def queries(tail: Tail) -> Op:
        return Copy(Sharding((heads * width, *tail), dim=0))

    return (
        *column(shape, CROSS + "linear_q.", (query,), queries, bias),
        *column(shape, CROSS + "linear_kv.", (key, value), lambda tail: KV(heads, width, tail), bias),
        *row(shape, CROSS + "linear_proj.", out, heads * width),
    )


def of_encoder(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules of a decoder for the same parameters of an encoder."""
    return tuple(replace(rule, core=rule.core.replace("decoder.", "encoder.", 1)) for rule in rules)


def fc1(shape: Shape, *hf: str) -> tuple[Rule, ...]:
    """Return the rules of the MLP's first linear: of (gate, up) for a gated MLP, else of (up,)."""
    width = shape.ffn_hidden_size

    def op(tail: Tail) -> Op:
        return Gated(width, tail) if shape.gated else Copy(Sharding((width, *tail), dim=0))

    return column(shape, MLP + "linear_fc1.", hf, op, shape.add_bias_linear)


def fused_fc1(shape: Shape, hf: str) -> tuple[Rule, ...]:
    """Return the rules of a gated MLP's first linear out of one tensor that holds the gate, then up."""
    width = shape.ffn_hidden_size
    return column(shape, MLP + "linear_fc1.", (hf,), lambda tail: Fused(Gated(width, tail)), shape.add_bias_linear)


def fc2(shape: Shape, hf: str) -> tuple[Rule, ...]:
    """Return the rules of the MLP's second linear."""
    return row(shape, MLP + "linear_fc2.", hf, shape.ffn_hidden_size)


def mixture(shape: Shape, router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of a mixture of gated experts without biases, whole on every tensor-parallel rank."""
    hidden, width = shape.hidden_size, shape.expert_width
    weights = Rule(MLP + "router.weight", (router + "weight",), Copy(Sharding((shape.num_moe_experts or 1, hidden))))
    first = Rule(EXPERT + "linear_fc1.weight", (gate + "weight", up + "weight"), Whole(Gated(width, (hidden,))))
    second = Rule(EXPERT + "linear_fc2.weight", (down + "weight",), Copy(Sharding((hidden, width))))
    return weights, first, second


def shared_expert(shape: Shape, router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of a gated expert that sees every token, weighted by its own ``router``; cut as an MLP is."""
    hidden, width = shape.hidden_size, shape.moe_shared_expert_intermediate_size or 1
    weights = Rule(SHARED + "gate_weight", (router + "weight",), Copy(Sharding((1, hidden))))
    first = Rule(SHARED + "linear_fc1.weight", (gate + "weight", up + "weight"), Gated(width, (hidden,)))
    second = Rule(SHARED + "linear_fc2.weight", (down + "weight",), Copy(Sharding((hidden, width), dim=1)))
    return weights, first, second


def of_layers(rules: tuple[Rule, ...], only: frozenset[int]) -> tuple[Rule, ...]:
    """Return ``rules`` for these layers alone."""
    return tuple(replace(rule, only=only) for rule in rules)


def conv1d(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return ``rules`` for weights that are stored [in, out]; biases stay as they are."""
    return tuple(replace(r, op=Transposed(r.op)) if r.core.endswith("weight") else r for r in rules)


def column(shape: Shape, core: str, hf: tuple[str, ...], op: Callable[[Tail], Op], bias: bool) -> tuple[Rule, ...]:
    """Return the rules of a column-parallel linear: ``op`` with its input dimension and, for the bias, without."""
    weight = Rule(core + "weight", tuple(name + "weight" for name in hf), op((shape.hidden_size,)))
    return (weight, Rule(core + "bias", tuple(name + "bias" for name in hf), op(()))) if bias else (weight,)


def row(shape: Shape, core: str, hf: str, inputs: int) -> tuple[Rule, ...]:
    """Return the rules of a row-parallel linear: a weight [h, inputs] cut along its inputs, a replicated bias."""
    weight = Rule(core + "weight", (hf + "weight",), Copy(Sharding((shape.hidden_size, inputs), dim=1)))
    bias = Rule(core + "bias", (hf + "bias",), Copy(Sharding((shape.hidden_size,))))
    return (weight, bias) if shape.add_bias_linear else (weight,)


def _vocabulary(shape: Shape, padded: int) -> Copy:
    return Copy(Sharding((shape.vocab_size, shape.hidden_size), dim=0, padded=padded))


def _qkv_op(shape: Shape) -> Callable[[Tail], Op]:
    return lambda tail: QKV(shape.num_attention_heads, shape.groups, shape.channels, tail)
