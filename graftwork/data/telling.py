"""What a data module says of the rows it reads: once, on one rank."""

import logging

from graftwork.data.cache import Report

log = logging.getLogger(__name__)


def tell(report: Report, limits: str, shown: bool) -> None:
    """Print how a source is read, where ``shown``; warn of fields that no template reads and of rows that were cut."""
    if shown:
        print(reading(report), flush=True)
    if report["unread"]:
        log.warning(
            "%s: no template reads %s of its rows, so a model never sees what they say; "
            "name a field in prompt_template, as {%s}, or leave it out.",
            report["file"], ", ".join(map(repr, report["unread"])), report["unread"][0],
        )  # fmt: skip
    if report["truncated"] or report["dropped"]:
        log.warning(
            "%s: %d rows had their prompt cut on the left and %d were dropped to fit %s (%d rows stay).",
            report["file"], report["truncated"], report["dropped"], limits, report["rows"],
        )  # fmt: skip


def reading(report: Report) -> str:
    """The line that says how a source is read."""
    return f"reading {report['file']}: {report['layout']}, {report['rows'] + report['dropped']:,} rows"
