"""What a run is known by beside its results, for the callbacks that write it down."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """``seed`` of the run, the text of its recipe and what was set beside it; None where nobody has told."""

    seed: int | None = None
    recipe_text: str | None = None
    recipe_changes: str | None = None


class WritesRunDown:
    """A callback that writes down what the run is: ``finetune`` tells it before the fit begins."""

    facts = RunFacts()

    def begin(self, facts: RunFacts) -> None:
        """Take the facts of the run that is about to begin."""
        self.facts = facts
