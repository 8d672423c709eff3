"""Checks of options, before anything is read. An invalid value raises an OptionError that names the option."""

import math
import os
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from int8cli.checkpoint.object_store import is_remote, shown_address
from int8cli.columns.wanted import AUTO, MODES, SMOOTH_MODES
from int8cli.commands.options import (
    ConvertOptions,
    DequantizeOptions,
    DeviceName,
    EstimateOptions,
    EvaluateOptions,
    GenerateOptions,
    InputsName,
    InspectOptions,
    PushOptions,
    ScalesName,
    VerifyOptions,
)
from int8cli.commands.wanted_columns import wants_smoothing
from int8cli.errors import CannotRunInPartsError, OptionError
from int8cli.planning.layouts import LAYOUTS, layout_of
from int8cli.records.conversion import (
    EXACT_SMOOTHING,
    FINE_SMOOTHING,
    FROM_ACTIVATIONS,
    FROM_WEIGHTS,
    NO_OUTLIERS,
)
from int8cli.workers.torch_start import start_torch

MOST_MACHINES = 10_000
_MOST_PARTS = 1_000_000
# The smallest allowed value of each count, by option. None is always allowed.
_SMALLEST = {
    "batch": 1,
    "context": 1,
    "max_new_tokens": 1,
    "outlier_columns": 0,
    "sequence_length": 2,
    "threads": 1,
    "tokens": 1,
    "workers": 1,
}


def check_convert(options: ConvertOptions) -> None:
    _check_counts(options)
    _check_choice("layout", options.layout, LAYOUTS)
    _check_choice("inputs", options.inputs, get_args(InputsName))
    if layout_of(options.layout, options.inputs) is None:
        able = " and ".join(name for name in LAYOUTS if layout_of(name, options.inputs) is not None)
        message = f"{options.inputs!r} needs the layout {able}; {options.layout} cannot express it"
        raise OptionError(message, option="inputs")
    _check_choice("float32", options.float32, ("direct", "float16"))
    _check_choice("on_nonfinite", options.on_nonfinite, ("error", "keep"))
    _check_threshold(options.threshold)
    _check_outliers(str(options.outliers), options.text)
    _check_budget(options)
    _check_target(options)
    if options.smooth is not None:
        _check_smooth(str(options.smooth), str(options.outliers))
    if not options.keep_output and wants_smoothing(options):
        raise OptionError(
            "a smoothed conversion needs its shards until it is finished",
            option="keep_output",
            hint="Turn smoothing off, or keep the shards here.",
        )
    if options.ray is not None and (options.part is not None or options.finish):
        raise OptionError("a cluster converts all parts", option="ray")
    if options.part is not None or options.finish:
        _check_part(options)
    if options.ray is not None and not options.ray:
        raise OptionError("the address is empty", option="ray")


def check_push(options: PushOptions) -> None:
    _check_counts(options)


def _check_part(options: ConvertOptions) -> None:
    """Refuse what several processes cannot do together."""
    if options.part is not None:
        part, parts = options.part
        if not 1 <= part <= parts:
            raise OptionError(f"there is no part {part} of {parts}: in K/N, K goes from 1 to N", option="part")
        if parts > _MOST_PARTS:
            raise OptionError(f"there are at most {_MOST_PARTS:,} parts", option="part")
        if options.finish:
            raise OptionError("a part finishes the conversion itself, if it is the last", option="finish")
    if options.overwrite:
        hint = "Delete the directory, or choose another one."
        raise OptionError("one part would delete what the others have written", option="overwrite", hint=hint)
    _refuse_running_the_model(options)


def _refuse_running_the_model(options: ConvertOptions) -> None:
    if options.smooth is not None and str(options.smooth) not in SMOOTH_MODES:
        return  # the file tells which columns to store, too
    if str(options.outliers) in (AUTO, FROM_ACTIVATIONS) and (options.outlier_columns != 0 or wants_smoothing(options)):
        raise CannotRunInPartsError(
            f"{str(options.outliers)!r} has to run the whole model, which a part cannot do",
            option="outliers",
            hint="Collect statistics once, and give the file to every part. Without smoothing, choosing columns by the "
            "weights, or storing none, does not run the model.",
        )


def check_dequantize(options: DequantizeOptions) -> None:
    if options.dtype is not None:
        _check_choice("dtype", options.dtype, ("float32", "float16", "bfloat16"))


def check_generate(options: GenerateOptions) -> None:
    _check_counts(options)
    _check_choice("inputs", options.inputs, ("zeropoint", "absmax"))
    if not (math.isfinite(options.temperature) and options.temperature >= 0.0):
        raise OptionError("the temperature must be a finite number, 0 or more", option="temperature")
    if not -(2**63) <= options.seed < 2**64:
        raise OptionError("the seed must fit into 64 bits", option="seed")
    for entry in options.max_memory:
        device, found, size = entry.partition("=")
        if not found or not size or not (device == "cpu" or device.isdecimal()):
            raise OptionError(f"{entry!r} is not DEVICE=SIZE, such as cpu=8GB or 0=10GB", option="max_memory")


def check_estimate(options: EstimateOptions) -> None:
    _check_counts(options)
    _check_choice("layout", options.layout, LAYOUTS)
    _check_choice("kv_dtype", options.kv_dtype, ("float32", "float16", "bfloat16", "float8"))
    for count in options.machines:
        if not 1 <= count <= MOST_MACHINES:
            raise OptionError(f"{count} is not from 1 to {MOST_MACHINES:,}", option="machines")
    if options.network is not None and not (math.isfinite(options.network) and options.network > 0.0):
        raise OptionError("the rate must be a finite number of bytes a second, over 0", option="network")


def check_inspect(options: InspectOptions) -> None:
    _check_counts(options)
    _check_choice("evidence", options.evidence or "activations", ("activations", "weights"))
    if not isinstance(options.smooth, bool | None):
        _check_choice("smooth", options.smooth, get_args(ScalesName))
    if options.smooth and options.evidence == "weights":
        raise OptionError("what to smooth is found by running the model, not from its weights", option="smooth")
    _check_threshold(options.threshold)


def check_verify(options: VerifyOptions) -> None:
    _check_counts(options)
    if options.revision is not None and options.source is None:
        raise OptionError("a revision of the source is given, but no source", option="revision")


def check_evaluate(options: EvaluateOptions) -> None:
    _check_counts(options)
    if options.smooth is not None:
        _check_choice("smooth", options.smooth, get_args(ScalesName))


def check_device(device: DeviceName) -> None:
    """Raise OptionError for a device that this machine does not have. Imports torch if the device is a GPU."""
    _check_choice("device", device, get_args(DeviceName))
    if device == "cpu":
        return
    start_torch()
    import torch

    if not torch.cuda.is_available():
        raise OptionError("torch finds no CUDA device on this machine", option="device")


def _check_counts(options: object) -> None:
    retry_for = getattr(options, "retry_for", 0.0)
    if not (math.isfinite(retry_for) and retry_for >= 0.0):
        raise OptionError("the time must be a finite number of seconds, 0 or more", option="retry_for")
    for name, smallest in _SMALLEST.items():
        value = getattr(options, name, None)
        if value is not None and value < smallest:
            raise OptionError(f"{value} is less than {smallest}", option=name)


def _check_target(options: ConvertOptions) -> None:
    """Raise OptionError for two places to push to, for the wrong kind of one, or for options that need one."""
    if options.push_to_hub is not None and options.push_to is not None:
        raise OptionError("a repository is given too", option="push_to")
    if options.push_to is not None and not is_remote(options.push_to):
        raise OptionError(
            f"{shown_address(options.push_to)!r} is not an address, such as s3://bucket/model", option="push_to"
        )
    if options.push_to_hub is not None and is_remote(options.push_to_hub):
        raise OptionError(
            f"{shown_address(options.push_to_hub)!r} is an address, not a repository on the Hub", option="push_to_hub"
        )
    if options.push_to_hub is None and options.push_to is None:
        for name in ("private", "push_revision", "commit_message", "keep_output"):
            if getattr(options, name) != getattr(ConvertOptions(), name):
                raise OptionError("it has no effect without a repository to push to", option=name)


def _check_choice(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise OptionError(f"{value!r} is not one of {', '.join(choices)}{_suggestion(value, choices)}", option=option)


def _check_threshold(threshold: float) -> None:
    if not (math.isfinite(threshold) and threshold >= 0.0):
        raise OptionError("the threshold must be a finite number, 0 or more", option="threshold")


def _check_outliers(value: str, text: Path | None) -> None:
    if value not in MODES and not _looks_like_a_file(value):
        message = f"{value!r} is not one of {', '.join(MODES)} and not a file{_suggestion(value, MODES)}"
        raise OptionError(message, option="outliers")
    if text is not None and value not in (AUTO, FROM_ACTIVATIONS):
        raise OptionError(f"a text has no effect if outlier columns come from {value!r}", option="text")


def _check_budget(options: ConvertOptions) -> None:
    budget, outliers = options.outlier_budget, str(options.outliers)
    if budget is None:
        return
    if not 0.0 < budget <= 1.0:
        raise OptionError(f"{budget} is not a share of the output, over 0 and at most 1", option="outlier_budget")
    if options.outlier_columns is not None:
        raise OptionError("a number of columns for each layer is given too", option="outlier_budget")
    if outliers in (FROM_WEIGHTS, NO_OUTLIERS):
        raise OptionError(
            f"{outliers!r} cannot tell how much storing a column helps",
            option="outlier_budget",
            hint="Run the model, or use the statistics of such a run.",
        )


def _check_smooth(value: str, outliers: str) -> None:
    if value in (EXACT_SMOOTHING, FINE_SMOOTHING) and outliers in (FROM_WEIGHTS, NO_OUTLIERS):
        raise OptionError(
            f"{value!r} needs a run of the model or its statistics, and {outliers!r} has neither",
            option="smooth",
            hint="Run the model without storing columns, or use the statistics of such a run.",
        )
    if value in SMOOTH_MODES:
        return
    if not _looks_like_a_file(value):
        message = f"{value!r} is not one of {', '.join(SMOOTH_MODES)} and not a file{_suggestion(value, SMOOTH_MODES)}"
        raise OptionError(message, option="smooth")
    if outliers not in (AUTO, NO_OUTLIERS, value):
        raise OptionError(f"the scales in {value} do not fit columns that come from {outliers!r}", option="smooth")


def _looks_like_a_file(value: str) -> bool:
    return bool(os.path.isfile(value) or Path(value).suffix or len(Path(value).parts) > 1)


def _suggestion(value: str, choices: Collection[str]) -> str:
    near = get_close_matches(value, choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""
