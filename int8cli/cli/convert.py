"""`int8cli convert`."""

import enum
import json
import math
import os
from pathlib import Path
from typing import Annotated

import typer

from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import Json, Model, Quiet, Revision

EXAMPLES = """\
int8cli convert bigscience/bloom
int8cli convert ./my-model -o ./my-model-int8 --dry-run
int8cli convert org/name --revision v1.0 --skip '*.down_proj' --json > report.json
int8cli convert org/name --layout compressed-tensors
"""
THREADS_FOR_A_SHARD = 4


class Layout(str, enum.Enum):
    """Output layouts."""

    bitsandbytes = "bitsandbytes"
    compressed_tensors = "compressed-tensors"


class Float32(str, enum.Enum):
    """How float32 weights become int8."""

    direct = "direct"
    float16 = "float16"


class OnNonFinite(str, enum.Enum):
    """What to do with a weight that holds NaN or an infinity."""

    error = "error"
    keep = "keep"


class Device(str, enum.Enum):
    """Where the arithmetic runs."""

    cpu = "cpu"
    cuda = "cuda"


@shows_errors
def convert(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write.", show_default="<name>-int8 here")
    ] = None,
    revision: Revision = None,
    layout: Annotated[Layout, typer.Option(help="For which loaders to write.")] = Layout.bitsandbytes,
    threshold: Annotated[
        float, typer.Option(help="llm_int8_threshold for the loader: inputs from here on go through 16 bit.", min=0.0)
    ] = 6.0,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave modules alone, by glob on their names. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Quantize no other modules. Repeatable.")
    ] = None,
    float32: Annotated[
        Float32, typer.Option(help="float32 weights: as they are, or through float16 as bitsandbytes does.")
    ] = Float32.direct,
    on_nonfinite: Annotated[
        OnNonFinite, typer.Option(help="A weight with NaN or Inf: stop, or keep it in its source dtype.")
    ] = OnNonFinite.error,
    workers: Annotated[
        int | None, typer.Option(help="Processes, one shard each.", show_default="by cores and shards", min=1, max=256)
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to quantize.")] = Device.cpu,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Keep downloaded shards, in the Hub cache.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, sizes and needs; fetch headers only, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew over an earlier conversion; other files are not touched.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to LLM.int8(), shard by shard, with a report of the error in every layer.

    The output opens in transformers + bitsandbytes as it is or, with --layout compressed-tensors, in vLLM. Embeddings,
    norms, biases and the output head stay in their dtype. Run the same command again after an interruption: finished
    shards are not done twice.
    """
    from int8cli.checkpoint.locate import open_source
    from int8cli.cli.progress import observe, warnings
    from int8cli.convert import ConvertOptions
    from int8cli.convert import convert as run
    from int8cli.layouts import LAYOUTS
    from int8cli.plan import PlanOptions
    from int8cli.records import RecordStore, Settings
    from int8cli.report.card import render_card
    from int8cli.report.plan import Needs, plan_to_json, show_plan
    from int8cli.report.terminal import show_report
    from int8cli.survey import survey_source

    require_device(device)
    if not math.isfinite(threshold):
        raise typer.BadParameter("a threshold is a finite number", param_hint="'--threshold'")
    output = output or default_output(model)
    settings = Settings(layout.value, threshold, tuple(skip or ()), tuple(only or ()), float32.value)
    with observe(quiet=quiet) as observer:
        incoming = RecordStore(output).incoming_directory
        source = open_source(
            model,
            revision=revision,
            download_dir=incoming,
            output=output,
            keep_source=keep_source,
            on_bytes=observer.received,
            on_wait=observer.waiting,
        )
        try:
            survey = survey_source(source, PlanOptions(settings.skip, settings.only), LAYOUTS[settings.layout])
            workers = workers or _workers(len(survey.layouts), on_hub=survey.identity.on_hub)
            threads = _threads(workers)
            if dry_run:
                for warning in warnings(survey):
                    observer.noted(warning)
                observer.close()
                needs = Needs.of(source, survey, output, threads=threads * workers)
                with writing_result():
                    if as_json:
                        print(json.dumps(plan_to_json(survey, needs), indent=2))
                    elif not quiet:
                        show_plan(survey, needs, output)
                return
            options = ConvertOptions(output, on_nonfinite.value, overwrite, workers, threads, device.value)
            report = run(source, survey, settings, options, render_card, observer)
        finally:
            source.close()
    with writing_result():
        if as_json:
            print(json.dumps(report.to_json(), indent=2))
        elif not quiet:
            show_report(report, output)


def default_output(model: str) -> Path:
    """`<name>-int8` in the current directory, for a Hub id, a directory or a file."""
    path = Path(model).expanduser()
    if path.is_file():
        return Path(f"{path.stem}-int8")
    name = path.resolve().name if path.exists() else model.rstrip("/").rpartition("/")[2]
    return Path(f"{name}-int8")


def require_device(device: Device) -> None:
    """Set torch up for this program, and refuse a device that is not there."""
    import torch

    torch.set_num_threads(1)  # threads over blocks are ours: OpenMP's own collapse beside other work
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device that torch can use", param_hint="'--device'")


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(shards: int, *, on_hub: bool) -> int:
    """Enough processes that each has the threads one shard can use; one where the network sets the pace."""
    return 1 if on_hub else max(1, min(shards, usable_cores() // THREADS_FOR_A_SHARD))


def _threads(workers: int) -> int:
    return max(1, min(THREADS_FOR_A_SHARD, usable_cores() // workers))
