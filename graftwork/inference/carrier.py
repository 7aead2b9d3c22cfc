"""What carries a proof, or can answer one's probe: an adapter of ours, one of Hugging Face PEFT, a checkpoint."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import ArtifactError, quoted
from graftwork.models.exchange import theirs
from graftwork.models.weights import fingerprint
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.directory import CONFIG
from graftwork.peft.artifact.proof import Proof, read

OURS, THEIRS, CHECKPOINT = "adapter", "export", "checkpoint"


@dataclass(frozen=True)
class Carrier:
    """A directory of one of three kinds; ``names``: the adapters in it, none where it does not tell.

    ``checksum`` is what a proof of it names.
    """

    path: Path
    kind: str
    checksum: str | None
    names: Sequence[str] = ()

    @classmethod
    def of(cls, path: str | Path) -> "Carrier":
        """Return what a directory is; raises ArtifactError for one that is neither, CheckpointError for a bad model."""
        place = Path(path)
        if theirs.recognised(place):
            with theirs.opened(place) as found:
                return cls(place, THEIRS, found.checksum)
        if (place / CONFIG).exists() or not place.is_dir():
            config = artifact.read_everywhere(place)
            return cls(place, OURS, config.checksum, [entry.name for entry in config.adapters])
        if (place / "config.json").is_file():
            return cls(place, CHECKPOINT, fingerprint(place))
        inside = sorted(str(file.parent) for file in place.rglob(CONFIG))
        hint = f"; name one of those inside of it, such as {quoted(inside[0])}" if inside else ""
        raise ArtifactError(f"{quoted(place)} is no adapter, no exported adapter and no merged model{hint}.")

    def __str__(self) -> str:
        return quoted(self.path)

    def proof(self) -> Proof:
        """Return the proof that it carries; raises ArtifactError for none, or one of something else."""
        return read(self.path, self.checksum)

    def own(self) -> Proof | None:
        """Return the proof that it carries, None where there is none that fits."""
        with suppress(ArtifactError):
            return self.proof()
        return None
