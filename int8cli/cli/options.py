"""Options and arguments that several commands share, and their allowed values."""

import enum
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class LayoutName(enum.StrEnum):
    """Output layouts."""

    bitsandbytes = "bitsandbytes"
    compressed_tensors = "compressed-tensors"


class Device(enum.StrEnum):
    """Where the arithmetic runs."""

    cpu = "cpu"
    cuda = "cuda"


class Scales(enum.StrEnum):
    """The scales of a smoothing."""

    exact = "exact"
    fine = "fine"


class InputsScheme(enum.StrEnum):
    """How the inputs of a linear layer become int8."""

    zeropoint = "zeropoint"
    absmax = "absmax"


def options_of(kind: type[Options], parameters: Mapping[str, object], **others: object) -> Options:
    """The library's options: each field from the command's parameter of that name or, where it is None, its default.

    `parameters` are the locals of a command. `others` are fields that the command makes itself.
    """
    named = {field.name: _plain(parameters.get(field.name)) for field in fields(kind)}
    return kind(**{name: value for name, value in named.items() if value is not None} | others)


def _plain(value: object) -> object:
    """The library's form of a parsed value: a choice by its name, a repeated option as a tuple."""
    if isinstance(value, enum.Enum):
        return value.value
    return tuple(value) if isinstance(value, list) else value


def parse_duration(text: str | float) -> float:
    """`90s`, `30m`, `12h`, `2d`, or seconds without a unit, in seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(text))
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 30m, 12h or 2d")
    return float(match[1]) * _SECONDS[match[2]]


def parse_rate(text: str | float) -> float:
    """`10Gbit/s`, `200 MB/s`, in bytes a second."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG])(bit|b|B)(?:/s|ps)\s*", str(text))
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a rate such as 1Gbit/s or 200MB/s")
    return float(match[1]) * {"M": 1e6, "G": 1e9}[match[2]] / (1 if match[3] == "B" else 8)


def complete_path(incomplete: str) -> Iterator[str]:
    """Directories and checkpoint files that begin with the typed text. Hub ids are not completed."""
    typed = Path(os.path.expanduser(incomplete))
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
        help="A Hub id (org/name), a directory, one checkpoint file, or an address (s3://bucket/model).",
        autocompletion=complete_path,
        show_default=False,
    ),
]
ConvertedDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A directory that int8cli convert wrote.",
        autocompletion=complete_path,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit on the Hub.", show_default="main", metavar="REV"),
]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 text to run the model on.", show_default="a built-in sample", metavar="FILE"),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens to run, in total.", min=1)]
SequenceLength = Annotated[int, typer.Option("--sequence-length", help="Tokens per sequence.", min=2)]
Seed = Annotated[int, typer.Option("--seed", help="Selects the pieces of a long text.")]
OutlierColumns = Annotated[
    int | None,
    typer.Option("--outlier-columns", help="The most columns to store for each linear layer.", show_default="8", min=0),
]
QuantizeDevice = Annotated[Device, typer.Option("--device", help="Device to quantize on.")]
ModelDevice = Annotated[Device, typer.Option("--device", help="Device to run the model on.")]
WorkDir = Annotated[
    Path | None,
    typer.Option("--work-dir", help="Directory for the state of an unfinished run.", show_default="the user's cache"),
]
RetryFor = Annotated[
    float,
    typer.Option(
        "--retry-for",
        parser=parse_duration,
        metavar="TIME",
        help="How long to retry a transfer that makes no progress: 90s, 30m, 12h, 2d.",
        show_default="3h",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository; refuse a public one.")]
CommitMessage = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Message of the commit.", show_default="names the model")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only: no progress, no report.")]


# What reports and their charts are written as.
PAGES = (".html", ".png", ".svg")


def check_outputs(paths: Sequence[Path], suffixes: Sequence[str] = PAGES, *, option: str = "--output") -> None:
    """Reject outputs that cannot be written, before anything is read. Those of PAGES need altair."""
    for path in paths:
        if path.suffix not in suffixes or path.is_dir():
            raise typer.BadParameter(f"{path} is not a {', '.join(suffixes)} file", param_hint=f"'{option}'")
    if any(path.suffix in PAGES for path in paths):
        from int8cli.report.vega import require_altair

        require_altair()


def say_written(path: Path, *, quiet: bool) -> None:
    """A line on stderr for a file that was asked for and is there now."""
    if not quiet:
        from int8cli.report.text import printable

        print(f"wrote {printable(str(path))}", file=sys.stderr)
