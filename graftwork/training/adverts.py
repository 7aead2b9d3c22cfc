"""What others advertise in the logs of a run, kept out of them."""

import logging

ADVERT = "💡 Tip"
"""So begins Lightning's advice to install another of its maker's products; nothing else of it does."""
SPOKEN_BY = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def no_advert(record: logging.LogRecord) -> bool:
    """Tell whether a record of Lightning's is about the run."""
    return not record.getMessage().startswith(ADVERT)


def keep_out() -> None:
    """Drop adverts from Lightning's loggers; what they say of a run stays."""
    for name in SPOKEN_BY:
        logging.getLogger(name).addFilter(no_advert)
