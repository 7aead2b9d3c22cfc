"""GPT-2, and GPT-3's shape: fused ``c_attn``, Conv1D weights stored [in, out], learned positions."""

from graftwork.errors import CheckpointError
from graftwork.models.shape import Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.family import Config, Family, ShapeFields, flag, number
from graftwork.models.weights.mapping import Mapping

GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Shape's activation by the name that a config gives it."""
CLASSIFIER = "shapes the head of a classifier, which no causal model has"


class GPT2(Family):
    """LayerNorm, GELU, learned positions, biases everywhere, tied embeddings by default."""

    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    notes = "learned positions; GPT-3's shape has no public weights"
    aliases = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    used = frozenset(
        {
            *("n_layer", "n_embd", "n_inner", "n_head", "vocab_size", "n_positions", "layer_norm_epsilon"),
            *("tie_word_embeddings", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
        }
    )
    fixed = {
        "activation_function": tuple(GELU),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "scale_attn_weights": (None, True),
        "add_cross_attention": (None, False),
    }
    irrelevant = {
        "reorder_and_upcast_attn": "another order of the same arithmetic",
        "n_ctx": "no longer read by transformers",
        **{
            f"summary_{what}": CLASSIFIER
            for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
        },
    }
    defaults = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields; two different dropouts of the hidden states are refused."""
        embedding, residual = (number(config, field) for field in ("embd_pdrop", "resid_pdrop"))
        if embedding != residual:
            raise CheckpointError(f"embd_pdrop={embedding} and resid_pdrop={residual} differ; one value is supported.")
        return {
            "num_layers": config["n_layer"],
            "hidden_size": config["n_embd"],
            "ffn_hidden_size": _inner(config),
            "num_attention_heads": config["n_head"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["n_positions"],
            "normalization": "LayerNorm",
            "layernorm_epsilon": number(config, "layer_norm_epsilon"),
            "activation": GELU[str(config["activation_function"])],
            "add_bias_linear": True,
            "position_embedding": "learned",
            "tie_embeddings": flag(config, "tie_word_embeddings", True),
            "hidden_dropout": residual,
            "attention_dropout": number(config, "attn_pdrop"),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields."""
        return {
            "n_layer": shape.num_layers,
            "n_embd": shape.hidden_size,
            "n_inner": shape.ffn_hidden_size,
            "n_head": shape.num_attention_heads,
            "n_positions": shape.max_position_embeddings,
            "layer_norm_epsilon": shape.layernorm_epsilon,
            "activation_function": "gelu" if shape.activation == "gelu" else "gelu_new",
            "resid_pdrop": shape.hidden_dropout,
            "embd_pdrop": shape.hidden_dropout,
            "attn_pdrop": shape.attention_dropout,
        }

    def mapping(self, shape: Shape, padded: int) -> Mapping:
        """Return the rules of GPT-2's tensor names; its first files leave out the prefix and carry causal masks."""
        layer, embedding = "transformer.h.{layer}.", "transformer.wte.weight"
        return Mapping(
            family=self.name,
            layers={"decoder": shape.num_layers},
            rules=(
                rules.embedding(shape, padded, embedding),
                rules.positions(shape, "transformer.wpe.weight"),
                *rules.norm(shape, rules.QKV_NORM, layer + "ln_1."),
                *rules.conv1d(rules.fused_qkv(shape, layer + "attn.c_attn.")),
                *rules.conv1d(rules.attention_output(shape, layer + "attn.c_proj.")),
                *rules.norm(shape, rules.FC1_NORM, layer + "ln_2."),
                *rules.conv1d(rules.fc1(shape, layer + "mlp.c_fc.")),
                *rules.conv1d(rules.fc2(shape, layer + "mlp.c_proj.")),
                *rules.norm(shape, rules.FINAL_NORM, "transformer.ln_f."),
                rules.output(shape, padded, embedding, head="lm_head.weight"),
            ),
            prefix="transformer.",
            ignored=(r"^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$",),
            twins=rules.tied_head(shape, "lm_head.weight", embedding),
        )


def _inner(config: Config) -> object:
    """Width of the MLP: four times the hidden size where the config does not say."""
    given, hidden = config.get("n_inner"), config["n_embd"]
    return 4 * hidden if given is None and isinstance(hidden, int) else given
