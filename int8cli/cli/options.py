"""Options and arguments that commands share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def complete_path(incomplete: str) -> Iterator[str]:
    """Directories and checkpoint files that begin with what was typed; a Hub id completes to nothing."""
    typed = Path(incomplete).expanduser()
    directory, prefix = (typed, "") if incomplete.endswith("/") or not incomplete else (typed.parent, typed.name)
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.name.startswith(prefix) and (path.is_dir() or path.suffix in {".safetensors", ".bin", ".pt", ".pth"}):
            shown = incomplete.removesuffix(prefix) if prefix else incomplete
            yield f"{shown}{path.name}" + ("/" if path.is_dir() else "")


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id (org/name), a directory, or one checkpoint file.",
        autocompletion=complete_path,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit on the Hub.", show_default="main", metavar="REV"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report; errors still show.")]
