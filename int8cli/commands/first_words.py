"""The first line of a command that imports torch: what it found, before the seconds that the import takes."""

from int8cli.checkpoint.source import Source
from int8cli.progress import Progress


def announce(source: Source, progress: Progress) -> None:
    """Say which model was found, and what the user waits for."""
    identity = source.identity
    at = f" at {identity.revision[:12]}" if identity.revision else ""
    progress.note(f"{identity.name}{at}: found; loading torch and transformers")
