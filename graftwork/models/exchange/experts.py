"""What Hugging Face PEFT can do with the experts of a mixture, which transformers 5 holds as parameters."""

import logging
from collections.abc import Iterable, Sequence

from graftwork.errors import ConfigError
from graftwork.models.exchange.low_rank import Pair
from graftwork.models.exchange.places import Places
from graftwork.models.exchange.stacks import stacked
from graftwork.peft.methods import IA3, DoRA, LoRA

log = logging.getLogger(__name__)


def as_parameters(transform: LoRA, places: Places, pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs of modules and, where PEFT reaches something as a parameter only, of parameters.

    Raises ConfigError for DoRA there; a dropout, which PEFT has none of there, is told to be left out.
    """
    found = stacked(places, pairs, transform.use_rslora)
    parameters = [pair.module for pair in found if pair.place]
    if parameters and isinstance(transform, DoRA):
        raise ConfigError(
            f"{transform} stands at {parameters[0]}, and Hugging Face PEFT has no DoRA of a parameter; choose "
            "experts='modules' for transformers 4, merge it (merge_adapters, export_hf), or serve it here."
        )
    if parameters and transform.dropout:
        log.warning(
            "%s goes out with lora_dropout=0.0: Hugging Face PEFT has no dropout in front of a parameter such as %s. "
            "Its answers are the same; were it trained on there, it would be without.",
            transform,
            parameters[0],
        )
    return found


def check_scales(transform: IA3, places: Places, modules: Iterable[str]) -> None:
    """Raise ConfigError for scales inside of experts: PEFT's IA3 has modules alone."""
    for module in modules:
        if places.modules[module].in_expert:
            raise ConfigError(
                f"{transform} scales {module}, and Hugging Face PEFT has no IA3 of a parameter, which experts are in "
                "transformers 5; train it with targets=['k', 'v'], choose experts='modules' for transformers 4, merge "
                "it (merge_adapters, export_hf), or serve it here."
            )
