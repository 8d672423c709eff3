"""What `--outliers` means for a model: the ways to know its columns that can be gone, the best first.

Owns the rules of `auto`. Each way comes with the settings and the sizes that follow from it, so that a dry run and a
conversion agree.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import xxhash

from int8cli.calibration.calibrate import CalibrateOptions, CalibrationObserver
from int8cli.calibration.cost import arithmetic_s
from int8cli.calibration.memory import return_memory_promptly
from int8cli.calibration.skeleton import build_skeleton
from int8cli.calibration.text import Text
from int8cli.checkpoint.source import Source
from int8cli.columns import FROM_ACTIVATIONS, FROM_STATISTICS, FROM_WEIGHTS, ColumnSource
from int8cli.columns.from_activations import CalibratedColumns, CalibrationRun
from int8cli.columns.from_statistics import StatisticsColumns, require_same_model
from int8cli.columns.from_weights import SuspectColumns, counts_from_weights
from int8cli.columns.wanted import AUTO, CANNOT_GO, MODES, ColumnsWanted, Way, without_columns
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import UnsupportedModelError
from int8cli.outlier_statistics import load_statistics
from int8cli.plan import Decision
from int8cli.records import Settings
from int8cli.survey import CONFIG_FILE, Survey

# What a tokenizer is loaded from; without any of them there is nothing to run a model over.
_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
)


def ways_to_choose(
    wanted: ColumnsWanted,
    source: Source,
    survey: Survey,
    settings: Settings,
    kept_in: Path,
    noted: Callable[[str], None],
) -> Iterator[Way]:
    """The ways that seem passable; one may still prove not to be, with UnsupportedModelError or the like.

    `kept_in` is the directory for what has to outlast a killed run. `noted` is told why a better way was left out.
    Raises TextError, StatisticsMismatchError, CheckpointError for what the user named.
    """
    if wanted.nothing(survey):
        yield without_columns(survey, settings)
        return
    mode = wanted.mode_to_go_on_with
    if mode not in MODES:
        yield _from_statistics(wanted, source, survey, settings)
        return
    if mode in (AUTO, FROM_ACTIVATIONS):
        try:
            dtype = _require_runnable(source, survey)
        except CANNOT_GO as error:
            if mode == FROM_ACTIVATIONS:
                raise
            noted(f"the activations cannot be looked at: {error}")
        else:
            yield _from_activations(wanted, source, survey, settings, kept_in, dtype)
    if mode in (AUTO, FROM_WEIGHTS):
        counts = counts_from_weights(survey, wanted.limit)
        if counts or mode == FROM_WEIGHTS:
            yield _from_weights(wanted, source, survey, settings, counts, kept_in)
    if mode == AUTO:
        yield without_columns(survey, settings)


def _from_statistics(wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings) -> Way:
    path = Path(wanted.mode)
    statistics = load_statistics(path)
    require_same_model(statistics, source, survey)
    columns = StatisticsColumns(survey, wanted.limit)
    columns.learn(statistics.sites)
    of = xxhash.xxh3_128_hexdigest(path.read_bytes())
    known = {linear.name for site in statistics.sites for linear in site.linears}
    counts = {each.spec.name: _most(each, wanted.limit) for each in survey.plan.quantized if each.module in known}
    return Way(
        replace(survey, stored_counts=counts),
        replace(settings, outliers=FROM_STATISTICS, outlier_columns=wanted.limit, calibration=f"statistics {of}"),
        lambda observer: columns,
    )


def _from_activations(
    wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings, kept_in: Path, dtype: torch.dtype
) -> Way:
    sampling = wanted.sampling
    if wanted.text is not None:
        text = Text.read(wanted.text, sampling.tokens)
    else:
        text = Text.decode(SAMPLE_NAME, sample_text())
    options = CalibrateOptions(
        sampling,
        settings.threshold or CalibrateOptions().threshold,
        wanted.device,
        kept_in / "blocks",
        leave_state=True,
        stored_columns=wanted.limit,
    )

    def columns(observer: CalibrationObserver) -> ColumnSource:
        return_memory_promptly()
        run = CalibrationRun(text, options, wanted.model_threads)
        return CalibratedColumns(source, survey, run, observer)

    def seconds() -> float:
        parameters = survey.plan.quantized_parameters
        return arithmetic_s(parameters, sampling.tokens, dtype, wanted.device, wanted.model_threads)

    used = f"{text.name}: {sampling.tokens:,} tokens in sequences of {sampling.sequence_length:,}"
    used += f", seed {sampling.seed}, sha256 {text.sha256[:16]}"
    return Way(
        replace(survey, stored_counts={e.spec.name: _most(e, wanted.limit) for e in survey.plan.quantized}),
        replace(settings, outliers=FROM_ACTIVATIONS, outlier_columns=wanted.limit, calibration=used),
        columns,
        seconds,
    )


def _from_weights(
    wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings, counts: dict[str, int], kept_in: Path
) -> Way:
    if not counts:
        raise UnsupportedModelError(
            "no linear layers that a norm feeds are recognised by their names, so the weights tell nothing",
            hint="--outliers activations tells by running the model, --outliers none stores no columns.",
        )
    return Way(
        replace(survey, stored_counts=counts),
        replace(settings, outliers=FROM_WEIGHTS, outlier_columns=wanted.limit),
        lambda observer: SuspectColumns(source, survey, wanted.limit, kept_in / "suspects"),
    )


def _most(decision: Decision, limit: int) -> int:
    in_features = decision.spec.shape[0] if decision.transpose else decision.spec.shape[1]
    return min(limit, in_features)


def _require_runnable(source: Source, survey: Survey) -> torch.dtype:
    """The dtype that the model runs in. Raises what a calibration would, as far as config.json and file names tell."""
    if not _TOKENIZER_FILES & set(source.list_files()):
        raise UnsupportedModelError("there is no tokenizer beside the weights")
    with tempfile.TemporaryDirectory(prefix="int8cli-") as name:
        if survey.has_config:
            (Path(name) / CONFIG_FILE).write_text(json.dumps(dict(survey.config)))
        specs = {stored.spec.name: stored.spec for layout in survey.layouts for stored in layout.tensors}
        skeleton = build_skeleton(Path(name), specs)
    model = skeleton.model
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{type(model).__name__} takes {model.main_input_name}, and there is only text")
    return skeleton.dtype
