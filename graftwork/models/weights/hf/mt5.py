"""mT5: T5 1.1 over a vocabulary of 101 languages."""

from graftwork.models.weights.hf.family import Config, ShapeFields
from graftwork.models.weights.hf.t5_like import T5Like


class MT5(T5Like):
    """Gated GELU; the decoder's output is never scaled."""

    name = "mt5"
    architecture = "MT5ForConditionalGeneration"
    notes = "mT5 (gated GELU, untied); encoder-decoder"
    defaults = {**T5Like.defaults, "feed_forward_proj": "gated-gelu"}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields."""
        return {**super().read(config), "scale_output": False}
