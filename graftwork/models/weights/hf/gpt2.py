"""GPT-2, and GPT-3's shape: fused ``c_attn``, Conv1D weights stored [in, out], learned positions."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.family import Config, Family, ShapeFields, number, refuse
from graftwork.models.weights.mapping import Mapping

GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Shape's activation by the name that a config gives it."""


class GPT2(Family):
    """LayerNorm, GELU, learned positions, biases everywhere, tied embeddings by default."""

    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    notes = "learned positions; GPT-3's shape has no public weights"

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields; scaled or cross attention and activations other than GELU are refused."""
        refuse(config, "activation_function", (None, *GELU))
        refuse(config, "scale_attn_by_inverse_layer_idx", (None, False))
        refuse(config, "scale_attn_weights", (None, True))
        refuse(config, "add_cross_attention", (None, False))
        return {
            "num_layers": config["n_layer"],
            "hidden_size": config["n_embd"],
            "ffn_hidden_size": config.get("n_inner") or 4 * int(number(config, "n_embd")),
            "num_attention_heads": config["n_head"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["n_positions"],
            "normalization": "LayerNorm",
            "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
            "activation": GELU[str(config.get("activation_function") or "gelu_new")],
            "add_bias_linear": True,
            "position_embedding": "learned",
            "tie_embeddings": config.get("tie_word_embeddings", True),
            "hidden_dropout": number(config, "resid_pdrop", 0.1),
            "attention_dropout": number(config, "attn_pdrop", 0.1),
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
            ignored=(r"\.attn\.(masked_)?bias$", *rules.tied_head(shape, "lm_head.weight")),
        )
