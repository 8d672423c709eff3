"""The options of `int8cli convert` that no other command has: their types, help and completion."""

import enum
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from int8cli.cli.options import LayoutName, complete_path
from int8cli.workers.ray_addresses import AUTO, HERE, LOCAL


class Float32(enum.StrEnum):
    """How float32 weights become int8."""

    direct = "direct"
    float16 = "float16"


class OnNonFinite(enum.StrEnum):
    """What to do with a weight that contains NaN or an infinity."""

    error = "error"
    keep = "keep"


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory to write.", show_default="<name>-int8 here")
]
Layout = Annotated[LayoutName, typer.Option(help="Which loader to write for: transformers with bitsandbytes, or vLLM.")]


class ConvertedInputs(enum.StrEnum):
    """How the inputs of an int8 layer are quantized."""

    absmax = "absmax"
    zeropoint = "zeropoint"
    none = "none"


Inputs = Annotated[
    ConvertedInputs,
    typer.Option(
        help="With compressed-tensors, how loaders quantize inputs; some ignore zero points. none: int8 weights only."
    ),
]
Threshold = Annotated[
    float,
    typer.Option(
        help="With bitsandbytes, llm_int8_threshold for the loader: inputs of this magnitude or more are multiplied in "
        "16 bit.",
        min=0.0,
    ),
]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Do not quantize modules that match this glob. Repeatable.")
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Quantize only modules that match this glob. Repeatable.")
]
HowFloat32 = Annotated[
    Float32, typer.Option(help="Quantize float32 weights directly, or from float16 as bitsandbytes does.")
]
WhenNonFinite = Annotated[OnNonFinite, typer.Option(help="For a weight with NaN or Inf: stop, or keep it as a float.")]


def complete_outliers(incomplete: str) -> Iterator[str]:
    """The modes, then statistics files and the directories on the way to them."""
    yield from (mode for mode in ("auto", "activations", "weights", "none") if mode.startswith(incomplete))
    yield from complete_path(incomplete)


Outliers = Annotated[
    str,
    typer.Option(
        metavar="auto|activations|weights|none|FILE",
        help="How to choose the outlier columns to store exactly: run the model (activations), use the weights "
        "alone, read a statistics file of inspect-outliers, or store none. auto: activations if the model can be "
        "run, otherwise weights.",
        autocompletion=complete_outliers,
    ),
]


def parse_share(text: str) -> float:
    """`1%` or `0.5 %` as a share: 0.01, 0.005."""
    number = str(text).strip().removesuffix("%").rstrip()
    try:
        percent = float(number) if str(text).strip().endswith("%") else math.nan
    except ValueError:
        percent = math.nan
    if not 0.0 < percent <= 100.0:
        raise typer.BadParameter(f"{text!r} is not a percentage, such as 1%")
    return percent / 100.0


OutlierBudget = Annotated[
    float | None,
    typer.Option(
        parser=parse_share,
        metavar="PERCENT",
        help="Instead of a number for each layer: how much all stored columns may take, in percent of the output's "
        "size (1%). They go where they help most. Needs a statistics file or a model on disk.",
        show_default="no budget",
    ),
]


def complete_smooth(incomplete: str) -> Iterator[str]:
    """The modes, then statistics files and the directories on the way to them."""
    yield from (mode for mode in ("auto", "exact", "fine", "none") if mode.startswith(incomplete))
    yield from complete_path(incomplete)


Smooth = Annotated[
    str | None,
    typer.Option(
        metavar="auto|exact|fine|none|FILE",
        help="Move what is hard to round from inputs into weights. exact: by powers of two, where a run of the model "
        "proves that it computes the same bits. auto: the same, if the model can be run. fine: in steps of 2^(1/4), "
        "which lose less in int8 but round norms. FILE: by statistics of inspect-outliers --smooth.",
        show_default="auto for compressed-tensors, else none",
        autocompletion=complete_smooth,
    ),
]

Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes; each converts one shard at a time.", show_default="from cores and shards", min=1, max=256
    ),
]

Figures = Annotated[
    bool, typer.Option("--figures/--no-figures", help="Measure the error of every layer, or convert faster without.")
]
KeepSource = Annotated[bool, typer.Option("--keep-source", help="Keep downloaded shards in the Hub cache.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan, sizes and requirements. Fetches headers only, writes nothing.")
]
Details = Annotated[bool, typer.Option("--details", help="Show tables: the error by kind of layer, the worst layers.")]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Write a page with the error of every layer (.html), or a picture (.png, .svg).",
        metavar="FILE",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier conversion; other files are not touched.")
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="REPO", help="Upload each shard to this repository on the Hub as it is finished, and commit at the end."
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The same with an object store: s3://bucket/model, gs://bucket/model."),
]
PushRevision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch to push to; created if missing.", show_default="main")
]
KeepOutput = Annotated[
    bool,
    typer.Option("--keep-output/--no-keep-output", help="Keep shards here after they are pushed, or remove them."),
]


def parse_part(text: str) -> tuple[int, int]:
    """`K/N` as two numbers."""
    part, slash, parts = str(text).partition("/")
    if not (slash and part.strip().isdecimal() and parts.strip().isdecimal()):
        raise typer.BadParameter(f"{text!r} is not K/N, such as 3/8 for the third of eight parts")
    return int(part), int(parts)


# The parser makes a tuple, but a tuple in the annotation would be an option with two values for Typer.
Part = Annotated[
    Any,
    typer.Option(
        "--part",
        parser=parse_part,
        metavar="K/N",
        help="Convert part K of N, for N processes on one machine or on several that see the same directory.",
        show_default="all shards",
    ),
]
Finish = Annotated[
    bool, typer.Option("--finish", help="Convert nothing: write index, config, card and report after all parts.")
]


def complete_address(incomplete: str) -> Iterator[str]:
    """The words that stand for an address."""
    yield from (word for word in (AUTO, HERE, LOCAL) if word.startswith(incomplete))


OnRay = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Convert the shards on a Ray cluster: at HOST:PORT, auto for that of this machine, local for a new one. "
        "Without ADDRESS: the one on this machine, or a new one. All machines must see the output under one path.",
        show_default="this machine",
        autocompletion=complete_address,
    ),
]
