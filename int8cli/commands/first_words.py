"""What a command says before it does anything slow: which model it found, and how long the work takes."""

from int8cli.checkpoint.source import Source
from int8cli.progress import Progress
from int8cli.results.units import human_seconds

_WORTH_SAYING_S = 10.0


def announce(source: Source, progress: Progress, *, runs: bool = True) -> None:
    """Say which model was found, and what the user waits for. `runs`: the model is run, which needs transformers."""
    identity = source.identity
    at = f" at {identity.revision[:12]}" if identity.revision else ""
    progress.note(f"{identity.name}{at}: found; loading torch{' and transformers' if runs else ''}")


def announce_duration(doing: str, seconds: float, progress: Progress) -> None:
    """Say how long the work takes, if the user would wait for it."""
    if seconds >= _WORTH_SAYING_S:
        progress.note(f"{doing}: about {human_seconds(seconds)} on this machine")
