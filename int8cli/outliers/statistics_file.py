"""The .safetensors file that stores the statistics of a calibration.

Owns its format. Each site has the tensors `<site>.minimum`, `.maximum`, `.absmax_later`, `.absmax_position`,
`.mean_square` and `.share_over`, and each linear layer has `<linear>.weight_error`. A smoothed site has
`.smooth_exponents`, and `.smooth_exponents.<tensor>` for each tensor whose rows are scaled, both in the unit that the
document has as `steps`; its linears have `.smoothed_weight_error`. Everything else, including model, revision and
text, is one JSON document in the metadata.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8cli.checkpoint.reader import open_regular
from int8cli.checkpoint.serialize import serialize
from int8cli.checkpoint.writer import write_file
from int8cli.errors import StatisticsFileError
from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.limits import EXACT_STEPS, MAX_EXPONENT, Steps
from int8cli.outliers.statistics import (
    LinearStatistics,
    OutlierStatistics,
    Provenance,
    ScaledRows,
    SiteSmoothing,
    SiteStatistics,
    SmoothedLinear,
)
from int8cli.typed_json import InvalidJsonError, inside, parse_json, read_as, shown

STATISTICS_SCHEMA = "int8cli.outlier-statistics/1"

_KEY = "int8cli"
_BY_DIMENSION = ("minimum", "maximum", "absmax_later", "absmax_position", "mean_square", "share_over")
_SIGNED = ("minimum", "maximum")
_BY_SITE = ("positions", "mean_squared_rowmax", "median")


def save_statistics(statistics: OutlierStatistics, path: Path, *, below: Path | None = None) -> None:
    """Write a statistics file, whole or not at all; `below` as in `write_file`. Raises OutputError."""
    document = {
        "schema": STATISTICS_SCHEMA,
        "provenance": _fields(statistics.provenance),
        "sites": [_site_to_json(site) for site in statistics.sites],
    }
    tensors = dict(_tensors(statistics))
    write_file(path, serialize(tensors, {_KEY: json.dumps(document)}), below=below)


def load_statistics(path: Path) -> OutlierStatistics:
    """Read a statistics file. Raises StatisticsFileError for any other file, with the reason."""
    try:
        os.close(open_regular(path))  # a pipe could block for ever
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_KEY)
            if metadata is None:
                raise InvalidJsonError(f"has no {_KEY} in its metadata")
            found = _read_document(parse_json(metadata.encode()), path)
            sites = tuple(
                _site(f"sites[{index}]", site, file.get_tensor, found.provenance.threshold)
                for index, site in enumerate(found.sites)
            )
            if len({site.smoothing.steps for site in found.sites if site.smoothing is not None}) > 1:
                raise InvalidJsonError("mixes powers of two with finer scales")
    except (SafetensorError, OSError, UnicodeError, InvalidJsonError) as error:
        raise StatisticsFileError(
            f"{path.name} is not a file of outlier statistics: {error!s:.200}",
            hint="Running the model makes such a file.",
        ) from error
    return OutlierStatistics(found.provenance, sites)


@dataclass(frozen=True, slots=True)
class _SmoothedFields:
    """What the document has of a linear layer once it is smoothed."""

    weight_sum_squares: float
    stored: tuple[int, ...] = ()
    measured_error: float | None = None
    measured_error_stored: float | None = None


@dataclass(frozen=True, slots=True)
class _LinearFields:
    """A linear layer in the document. Its weight error is a tensor of the file."""

    name: str
    out_features: int
    in_features: int
    weight_sum_squares: float
    output_mean_square: float
    stored: tuple[int, ...] = ()
    measured_error: float | None = None
    measured_error_stored: float | None = None
    smoothed: _SmoothedFields | None = None


@dataclass(frozen=True, slots=True)
class _SmoothingFields:
    """A site's smoothing in the document. The exponents are tensors of the file."""

    alpha: float
    scaled: tuple[str, ...]
    mean_squared_rowmax: float = 0.0
    steps: Steps = EXACT_STEPS


@dataclass(frozen=True, slots=True)
class _SiteFields:
    """A site in the document. Its figures by dimension are tensors of the file."""

    name: str
    kind: Literal["norm-fed", "attention output", "second feed-forward", "residual"]
    stack: str | None
    layer: int | None
    positions: int
    mean_squared_rowmax: float
    median: float
    linears: tuple[_LinearFields, ...]
    smoothing: _SmoothingFields | None = None
    not_smoothed: str = ""


@dataclass(frozen=True, slots=True)
class _Document:
    schema: str
    provenance: Provenance
    sites: tuple[_SiteFields, ...]


def _read_document(document: Any, path: Path) -> _Document:
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, str) and schema != STATISTICS_SCHEMA:
        raise StatisticsFileError(
            f"{path.name}: its schema is {shown(schema)}; this version reads {STATISTICS_SCHEMA!r}",
            hint="Make the file again with this version.",
        )
    found = read_as(_Document, document)
    _require_finite(found.sites, "sites")
    return found


def _require_finite(value: Any, place: str) -> None:
    """Raise InvalidJsonError for an infinite number anywhere in a value of the document."""
    if isinstance(value, float) and math.isinf(value):
        raise InvalidJsonError(f"is {value}", place)
    if isinstance(value, tuple):
        for index, each in enumerate(value):
            _require_finite(each, f"{place}[{index}]")
    elif is_dataclass(value):
        for field in fields(value):
            _require_finite(getattr(value, field.name), f"{place}.{field.name}")


def _site(place: str, site: _SiteFields, tensor: Callable[[str], Tensor], threshold: float) -> SiteStatistics:
    with inside(place):
        by_dimension = {name: _figures(tensor, f"{site.name}.{name}", signed=name in _SIGNED) for name in _BY_DIMENSION}
        figures: dict[str, Any] = {**{name: getattr(site, name) for name in _BY_SITE}, **by_dimension}
        inputs = InputSummary(threshold=threshold, **figures)
        for name, found in by_dimension.items():
            if len(found) != inputs.features:
                raise InvalidJsonError(f"{site.name}.{name} has {len(found)} values, not {inputs.features}")
        linears = tuple(
            _linear(f"linears[{index}]", linear, tensor, inputs.features) for index, linear in enumerate(site.linears)
        )
        smoothing = _smoothing(site, tensor, inputs.features)
    where = site.name, site.kind, site.stack, site.layer
    return SiteStatistics(*where, inputs, linears, smoothing, site.not_smoothed)


def _smoothing(site: _SiteFields, tensor: Callable[[str], Tensor], features: int) -> SiteSmoothing | None:
    if site.smoothing is None:
        return None
    steps = site.smoothing.steps
    exponents = _exponents(tensor, _smooth_name(site.name), steps)
    if len(exponents) != features:
        raise InvalidJsonError(f"{_smooth_name(site.name)} has {len(exponents)} values, not {features}")
    scaled = tuple(
        ScaledRows(name, _exponents(tensor, _scaled_name(site.name, name), steps)) for name in site.smoothing.scaled
    )
    return SiteSmoothing(exponents, site.smoothing.alpha, scaled, site.smoothing.mean_squared_rowmax, steps)


def _exponents(tensor: Callable[[str], Tensor], name: str, steps: Steps) -> Tensor:
    found, largest = _vector(tensor, name), MAX_EXPONENT * steps
    if found.dtype != torch.int8 or (found.numel() and int(found.int().abs().max()) > largest):
        raise InvalidJsonError(f"{name} is not made of exponents from -{largest} to {largest}")
    return found


def _smooth_name(site: str) -> str:
    return f"{site}.smooth_exponents"


def _smoothed_name(linear: str) -> str:
    return f"{linear}.smoothed_weight_error"


def _scaled_name(site: str, tensor: str) -> str:
    return f"{site}.smooth_exponents.{tensor}"


def _linear(place: str, linear: _LinearFields, tensor: Callable[[str], Tensor], features: int) -> LinearStatistics:
    with inside(place):
        weight_error = _figures(tensor, f"{linear.name}.weight_error")
        if not linear.in_features == features == len(weight_error):
            raise InvalidJsonError(
                f"{linear.name} has {linear.in_features} inputs, {len(weight_error)} errors and a site of {features}"
            )
        _check_stored(linear.stored, features)
        smoothed = None
        if linear.smoothed is not None:
            name = _smoothed_name(linear.name)
            smoothed_error = _figures(tensor, name)
            if len(smoothed_error) != features:
                raise InvalidJsonError(f"{name} has {len(smoothed_error)} values, not {features}")
            with inside("smoothed"):
                _check_stored(linear.smoothed.stored, features)
            smoothed = SmoothedLinear(weight_error=smoothed_error, **_fields(linear.smoothed))
    return LinearStatistics(weight_error=weight_error, **{**_fields(linear), "smoothed": smoothed})


def _check_stored(stored: tuple[int, ...], features: int) -> None:
    if any(not 0 <= column < features for column in stored):
        raise InvalidJsonError(f"{shown(list(stored))} are not all among {features} inputs", "stored")


def _figures(tensor: Callable[[str], Tensor], name: str, *, signed: bool = False) -> Tensor:
    """One finite number for each dimension; not negative unless `signed`."""
    found = _vector(tensor, name)
    if found.dtype not in (torch.float32, torch.int32) or not bool(torch.isfinite(found).all()):
        raise InvalidJsonError(f"{name} is not made of finite numbers")
    if not signed and bool((found < 0).any()):
        raise InvalidJsonError(f"{name} has negative numbers")
    return found


def _vector(tensor: Callable[[str], Tensor], name: str) -> Tensor:
    found = tensor(name)
    if found.dim() != 1:
        raise InvalidJsonError(f"{name} has the shape {list(found.shape)}, not one dimension")
    return found


def _tensors(statistics: OutlierStatistics) -> Iterator[tuple[str, Tensor]]:
    for site in statistics.sites:
        for name in _BY_DIMENSION:
            yield f"{site.name}.{name}", getattr(site.inputs, name).contiguous()
        for linear in site.linears:
            yield f"{linear.name}.weight_error", linear.weight_error.contiguous()
            if linear.smoothed is not None:
                yield _smoothed_name(linear.name), linear.smoothed.weight_error.contiguous()
        if site.smoothing is not None:
            yield _smooth_name(site.name), site.smoothing.exponents
            for scaled in site.smoothing.scaled:
                yield _scaled_name(site.name, scaled.tensor), scaled.exponents


def _site_to_json(site: SiteStatistics) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "stack": site.stack,
        "layer": site.layer,
        **{name: getattr(site.inputs, name) for name in _BY_SITE},
        "linears": [_linear_to_json(linear) for linear in site.linears],
        **({"smoothing": _smoothing_to_json(site.smoothing)} if site.smoothing is not None else {}),
        **({"not_smoothed": site.not_smoothed} if site.not_smoothed else {}),
    }


def _linear_to_json(linear: LinearStatistics) -> dict[str, Any]:
    fields = _without_error(linear)
    del fields["smoothed"]
    return fields | ({"smoothed": _without_error(linear.smoothed)} if linear.smoothed is not None else {})


def _without_error(linear: LinearStatistics | SmoothedLinear) -> dict[str, Any]:
    return {name: value for name, value in _fields(linear).items() if name != "weight_error"}


def _smoothing_to_json(smoothing: SiteSmoothing) -> dict[str, Any]:
    return {
        "alpha": smoothing.alpha,
        "scaled": [scaled.tensor for scaled in smoothing.scaled],
        "mean_squared_rowmax": smoothing.mean_squared_rowmax,
        **({"steps": smoothing.steps} if smoothing.steps != EXACT_STEPS else {}),
    }


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a slotted dataclass, without copying their values."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
