"""`int8cli evaluate`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    from int8cli.evaluation.columns import ChosenColumns
    from int8cli.evaluation.methods import Method
    from int8cli.evaluation.subject import Subject
    from int8cli.model.text import Text
    from int8cli.results.evaluation import Evaluation

EXAMPLES = """\
int8cli evaluate bigscience/bloom-560m
int8cli evaluate ./my-model --text corpus.txt --tokens 16384 -o report.html
int8cli evaluate ./my-model --methods vector-wise,llm-int8-stored --json
int8cli evaluate ./my-model-int8 --source ./my-model
"""
_SUFFIXES = (".html", ".png", ".svg")
_MALLOC_KEEPS_BYTES = 32 << 20  # smaller temporaries are used again: half the CPU time, 80 MB more than 1 MiB


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked for, past parsing."""

    methods: "tuple[Method, ...]"
    sampling: tuple[int, int, int]
    outliers: Path | None
    columns: int
    device: str
    work: Path


@shows_errors
def evaluate(
    model: Model,
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="Tokens to run, in all.", min=2)] = 4096,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods by name, with commas or repeated; `all` has some more than the table has by default.",
            show_default="the table's",
            metavar="NAMES",
        ),
    ] = None,
    outlier_columns: Annotated[
        int | None, typer.Option(help="Columns that each layer stores, at most.", min=0, show_default="8")
    ] = None,
    outliers: Annotated[
        Path | None,
        typer.Option(
            help="Statistics to choose them by, from inspect-outliers.",
            show_default="a calibration on another sample",
            metavar="FILE",
        ),
    ] = None,
    source_model: Annotated[
        str | None,
        typer.Option("--source", help="Beside a converted model: the 16-bit one it was made from.", metavar="MODEL"),
    ] = None,
    revision: Revision = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help=".html, .png or .svg. Repeatable.", metavar="FILE"),
    ] = None,
    work_dir: WorkDir = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare int8 methods on a model: perplexity beside 16 bit, divergence from it, and output error by layer.

    All methods run in one pass over the weights, with one block in memory. Stored columns are chosen by a calibration
    on another text: one pass more. Of a model that convert wrote, its own int8 tensors are evaluated; with --source,
    beside the 16-bit model. Encoders get output errors only. A run that was interrupted goes on after its last block.
    """
    from int8cli.cli.inspect_progress import observe_inspection
    from int8cli.columns.wanted import DEFAULT_OUTLIER_COLUMNS
    from int8cli.evaluation.methods import chosen_methods

    outputs = tuple(output or ())
    check_outputs(outputs, _SUFFIXES, drawn=_SUFFIXES)
    require_device(device)
    wanted = chosen_methods(name.strip() for names in methods or () for name in names.split(",") if name.strip())
    limit = DEFAULT_OUTLIER_COLUMNS if outlier_columns is None else outlier_columns
    work = work_directory(work_dir, model, revision)
    request = _Request(wanted, (tokens, sequence_length, seed), outliers, limit, device.value, work)
    # The revision is that of the Hub's model; beside a converted one in a directory, of the source.
    of_source = revision if source_model is not None and Path(model).expanduser().exists() else None
    of_model = None if of_source is not None else revision
    with (
        observe_inspection(quiet=quiet) as observer,
        _opened(model, of_model, work / "incoming", observer) as source,
        _opened(source_model, of_source, work / "incoming-source", observer) as reference,
    ):
        assert source is not None
        found = _evaluate(source, reference, text, request, observer)
    for path in outputs:
        from int8cli.report.evaluation_page import write_evaluation

        write_evaluation(found, path)
    with writing_result():
        _show(found, as_json=as_json, quiet=quiet)


def _evaluate(
    source: "Source", reference: "Source | None", text: Path | None, request: _Request, observer: "InspectObserver"
) -> "Evaluation":
    from int8cli.data import HELD_OUT_NAME, held_out_text
    from int8cli.evaluation.evaluate import evaluate as run
    from int8cli.evaluation.options import EvaluateOptions
    from int8cli.evaluation.subject import find_subject
    from int8cli.model.memory import return_memory_promptly
    from int8cli.model.sampling import Sampling
    from int8cli.model.text import Text

    return_memory_promptly(_MALLOC_KEEPS_BYTES)
    sampling = Sampling(*request.sampling)
    read = Text.read(text, sampling.tokens) if text is not None else Text.decode(HELD_OUT_NAME, held_out_text())
    subject = find_subject(source, reference)
    columns = _columns(subject, read, request, observer)
    options = EvaluateOptions(
        request.methods, sampling, subject.threshold, request.device, kept_in=request.work / "evaluation"
    )
    return run(subject, read, columns, options, observer)


def _columns(
    subject: "Subject", evaluated: "Text", request: _Request, observer: "InspectObserver"
) -> "ChosenColumns | None":
    """The columns that a 16-bit model would store, if a method needs them: by statistics, or by a calibration."""
    from int8cli.columns.from_statistics import require_same_model
    from int8cli.data import SAMPLE_NAME, sample_text
    from int8cli.evaluation.columns import calibrated_columns, columns_from
    from int8cli.evaluation.options import applicable
    from int8cli.model.text import Text
    from int8cli.outliers.calibrate import CalibrateOptions
    from int8cli.outliers.statistics import load_statistics

    if subject.converted is not None or not applicable(subject, request.methods).needs_columns:
        return None
    assert subject.survey is not None
    if request.outliers is not None:
        statistics = load_statistics(request.outliers)
        require_same_model(statistics, subject.runs, subject.survey)
        if statistics.provenance.text_sha256 == evaluated.sha256:
            observer.noted("warning: the statistics were made on the text that is evaluated")
        return columns_from(statistics, request.columns)
    options = CalibrateOptions(device=request.device, kept_in=request.work / "blocks")
    text = Text.decode(SAMPLE_NAME, sample_text())
    return calibrated_columns(subject, text, evaluated, request.columns, options, observer)


@contextmanager
def _opened(
    model: str | None, revision: str | None, download_dir: Path, observer: "InspectObserver"
) -> "Iterator[Source | None]":
    from int8cli.checkpoint.locate import open_source

    if model is None:
        yield None
        return
    source = open_source(
        model, revision=revision, download_dir=download_dir, on_bytes=observer.received, on_wait=observer.waiting
    )
    try:
        yield source
    finally:
        source.close()


def _show(found: "Evaluation", *, as_json: bool, quiet: bool) -> None:
    from int8cli.report.evaluation import show_evaluation
    from int8cli.results.evaluation import evaluation_to_json

    if as_json:
        print(json.dumps(evaluation_to_json(found), indent=2))
    elif not quiet:
        show_evaluation(found)
