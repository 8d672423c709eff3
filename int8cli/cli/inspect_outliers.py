"""`int8cli inspect-outliers`."""

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import (
    Device,
    Json,
    Model,
    Quiet,
    Revision,
    Seed,
    SequenceLength,
    TextFile,
    WorkDir,
    check_outputs,
    require_device,
)
from int8cli.cli.work_directory import work_directory

if TYPE_CHECKING:
    from int8cli.checkpoint.source import Source
    from int8cli.cli.inspect_progress import InspectObserver
    from int8cli.outliers.statistics import OutlierStatistics
    from int8cli.outliers.suspects import WeightSuspects
    from int8cli.planning.survey import Survey

EXAMPLES = """\
int8cli inspect-outliers bigscience/bloom-560m
int8cli inspect-outliers ./my-model --text corpus.txt -o report.html -o outliers.safetensors
int8cli inspect-outliers org/name --from weights --json > suspects.json
"""
_DRAWN = (".html", ".png", ".svg")
_SUFFIXES = (*_DRAWN, ".safetensors")


class From(enum.StrEnum):
    """Where the answer comes from."""

    activations = "activations"
    weights = "weights"


@shows_errors
def inspect_outliers(
    model: Model,
    source_of: Annotated[
        From | None,
        typer.Option(
            "--from", help="Run the model, or guess from its weights.", show_default="activations if it can run"
        ),
    ] = None,
    revision: Revision = None,
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="Tokens to run, in all.", min=1)] = 4096,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    threshold: Annotated[float, typer.Option(help="Magnitude from which a value is an outlier.", min=0.0)] = 6.0,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help=".html, .png, .svg, or .safetensors for convert. Repeatable.", metavar="FILE"
        ),
    ] = None,
    work_dir: WorkDir = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the feature dimensions that carry outliers, by layer: the model is run, with one block in memory.

    Weights are read straight from the checkpoint and each of them once. A run that was interrupted goes on after its
    last finished block. From the weights alone only suspects can be told.
    """
    from int8cli.checkpoint.locate import open_source
    from int8cli.cli.inspect_progress import observe_inspection
    from int8cli.planning.plan import PlanOptions
    from int8cli.planning.survey import survey_source

    outputs = tuple(output or ())
    check_outputs(outputs, _SUFFIXES, drawn=_DRAWN)
    if source_of is From.weights and any(path.suffix not in _DRAWN for path in outputs):
        raise typer.BadParameter("statistics come from activations only", param_hint="'--output'")
    require_device(device)
    work = work_directory(work_dir, model, revision)
    with observe_inspection(quiet=quiet) as observer:
        source = open_source(
            model,
            revision=revision,
            download_dir=work / "incoming",
            on_bytes=observer.received,
            on_wait=observer.waiting,
        )
        try:
            survey = survey_source(source, PlanOptions())
            sampling = (tokens, sequence_length, seed)
            found = _inspect(source, survey, source_of, text, sampling, threshold, device, work / "blocks", observer)
        finally:
            source.close()
    for path in outputs:
        _write(found, path)
    with writing_result():
        _show(found, as_json=as_json, quiet=quiet)


def _inspect(
    source: "Source",
    survey: "Survey",
    source_of: From | None,
    text: Path | None,
    sampling: tuple[int, int, int],
    threshold: float,
    device: Device,
    kept_in: Path,
    observer: "InspectObserver",
) -> "OutlierStatistics | WeightSuspects":
    """From activations if that is asked for or can be done, else from weights."""
    from int8cli.errors import MissingExtraError, UnsupportedModelError
    from int8cli.outliers.suspects import find_suspects

    if source_of is not From.weights:
        try:
            return _calibrate(source, survey, text, sampling, threshold, device, kept_in, observer)
        except (MissingExtraError, UnsupportedModelError) as error:
            if source_of is From.activations:
                raise
            observer.noted(f"note: {error}; telling suspects from the weights instead")
    return find_suspects(source, survey)


def _calibrate(
    source: "Source",
    survey: "Survey",
    text: Path | None,
    sampling: tuple[int, int, int],
    threshold: float,
    device: Device,
    kept_in: Path,
    observer: "InspectObserver",
) -> "OutlierStatistics":
    from int8cli.data import SAMPLE_NAME, sample_text
    from int8cli.model.memory import return_memory_promptly
    from int8cli.model.sampling import Sampling
    from int8cli.model.text import Text
    from int8cli.outliers.calibrate import CalibrateOptions, calibrate

    return_memory_promptly()
    chosen = Sampling(*sampling)
    read = Text.read(text, chosen.tokens) if text is not None else Text.decode(SAMPLE_NAME, sample_text())
    options = CalibrateOptions(chosen, threshold, device.value, kept_in)
    return calibrate(source, survey, read, options, observer)


def _write(found: "OutlierStatistics | WeightSuspects", path: Path) -> None:
    from int8cli.errors import OutputError
    from int8cli.outliers.statistics import OutlierStatistics, save_statistics
    from int8cli.report.outlier_charts import write_picture
    from int8cli.report.outlier_page import write_page

    if path.suffix == ".html":
        write_page(found, path)
    elif path.suffix != ".safetensors":
        write_picture(found, path)
    elif isinstance(found, OutlierStatistics):
        save_statistics(found, path)
    else:
        raise OutputError(
            f"{path} is not written: there are suspects only, and statistics come from activations",
            hint="pip install 'int8cli[calibrate]', or leave this output out.",
        )


def _show(found: "OutlierStatistics | WeightSuspects", *, as_json: bool, quiet: bool) -> None:
    from int8cli.outliers.statistics import OutlierStatistics
    from int8cli.report.outliers import show_statistics, show_suspects
    from int8cli.report.outliers_json import statistics_to_json, suspects_to_json

    if isinstance(found, OutlierStatistics):
        if as_json:
            print(json.dumps(statistics_to_json(found), indent=2))
        elif not quiet:
            show_statistics(found)
    elif as_json:
        print(json.dumps(suspects_to_json(found), indent=2))
    elif not quiet:
        show_suspects(found)
