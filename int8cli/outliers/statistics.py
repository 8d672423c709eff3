"""What calibration found, as result objects, and the .safetensors file that holds them.

Owns the file's format: by site the tensors `<site>.minimum`, `.maximum`, `.absmax_later`, `.absmax_position`,
`.mean_square`, `.share_over`; by linear layer `<linear>.weight_error`; everything else, and which model, revision and
text it is all of, as one JSON document in the metadata. Computes nothing that is not in `llm_int8.outliers`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8cli.checkpoint.serialize import serialize
from int8cli.checkpoint.writer import write_file
from int8cli.errors import StatisticsFileError
from int8cli.llm_int8.columns import predicted_output_error
from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.outliers import MassiveActivation, OutlierFeature, massive_activations, systematic_features
from int8cli.typed_json import InvalidJsonError, parse_json, read_as, shown

Read = TypeVar("Read")

STATISTICS_SCHEMA = "int8cli.outlier-statistics/1"
NORM_FED = "norm-fed"
ATTENTION_OUTPUT = "attention output"
SECOND_FEED_FORWARD = "second feed-forward"
RESIDUAL = "residual"

_KEY = "int8cli"
_BY_DIMENSION = ("minimum", "maximum", "absmax_later", "absmax_position", "mean_square", "share_over")
_BY_SITE = ("positions", "mean_squared_rowmax", "median")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the statistics are of: model and revision as the source calls them, the text, and how it was used.

    `model_fingerprint` tells local checkpoints of one name apart. `tokens` are those that were run.
    """

    model: str
    revision: str | None
    model_fingerprint: str
    text: str
    text_sha256: str
    tokens: int
    sequence_length: int
    seed: int
    dtype: str
    threshold: float


@dataclass(frozen=True, slots=True)
class LinearStatistics:
    """A linear layer: its shape, ||dW_:j||² by input column (in,), ||W||², and E||X Wᵀ||² as measured, without bias.

    Where it was run in int8 too: the columns then stored exactly, and its relative output error without and with them.
    """

    name: str
    out_features: int
    in_features: int
    weight_error: Tensor
    weight_sum_squares: float
    output_mean_square: float
    stored: tuple[int, ...] = ()
    measured_error: float | None = None
    measured_error_stored: float | None = None


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """An input that `linears` share. `kind` is one of the four names above; a residual site has no linears.

    `stack` and `layer` say which block it is in; both None outside of the blocks.
    """

    name: str
    kind: str
    stack: str | None
    layer: int | None
    inputs: InputSummary
    linears: tuple[LinearStatistics, ...]

    def predicted_error(self, linear: LinearStatistics, *, int8_inputs: bool, exact: tuple[int, ...] = ()) -> float:
        """Relative output error of one of the linears: with int8 weights alone, or vector-wise with int8 inputs too."""
        return predicted_output_error(
            self.inputs.mean_square,
            linear.weight_error,
            linear.output_mean_square,
            mean_squared_rowmax=self.inputs.mean_squared_rowmax if int8_inputs else 0.0,
            weight_sum_squares=linear.weight_sum_squares if int8_inputs else 0.0,
            exact=exact,
        )

    def worst_predicted_error(self, *, int8_inputs: bool) -> float:
        """The largest of its linears."""
        return max((self.predicted_error(linear, int8_inputs=int8_inputs) for linear in self.linears), default=0.0)


@dataclass(frozen=True, slots=True)
class LocatedFeature:
    """A systematic outlier feature, with the layers it is in, of all there are in its stack."""

    stack: str
    feature: OutlierFeature
    layers: tuple[int, ...]
    layer_count: int


@dataclass(frozen=True, slots=True)
class LocatedActivation:
    """A massive activation and the site it is at."""

    site: SiteStatistics
    activation: MassiveActivation


@dataclass(frozen=True, slots=True)
class OutlierStatistics:
    """Everything that one calibration found, by site in the order in which the model computes them."""

    provenance: Provenance
    sites: tuple[SiteStatistics, ...]

    @property
    def linear_sites(self) -> tuple[SiteStatistics, ...]:
        return tuple(site for site in self.sites if site.linears)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream: of most norm-fed sites."""
        widths = [site.inputs.features for site in self.sites if site.kind == NORM_FED]
        return max(sorted(set(widths)), key=widths.count) if widths else 0

    def norm_fed_layers(self) -> dict[str, dict[int, tuple[SiteStatistics, ...]]]:
        """By stack and layer, the norm-fed sites that share the residual's index space."""
        found: dict[str, dict[int, tuple[SiteStatistics, ...]]] = {}
        for site in self.sites:
            if site.kind == NORM_FED and site.layer is not None and site.inputs.features == self.hidden_size:
                layers = found.setdefault(site.stack or "", {})
                layers[site.layer] = (*layers.get(site.layer, ()), site)
        return found

    def features(self) -> tuple[LocatedFeature, ...]:
        """The systematic outlier features of each stack of blocks."""
        found = []
        for stack, layers in self.norm_fed_layers().items():
            numbers = sorted(layers)
            summaries = [[site.inputs for site in layers[number]] for number in numbers]
            for feature in systematic_features(summaries):
                where = tuple(numbers[place] for place in feature.layers)
                found.append(LocatedFeature(stack, feature, where, len(numbers)))
        return tuple(found)

    def massive(self) -> tuple[LocatedActivation, ...]:
        """The massive activations of all sites, largest first."""
        found = [
            LocatedActivation(site, activation)
            for site in self.sites
            for activation in massive_activations(site.inputs)
        ]
        return tuple(sorted(found, key=lambda located: -abs(located.activation.value)))


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
    """Read a statistics file. Raises StatisticsFileError for anything else, naming what in it is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_KEY)
            if metadata is None:
                raise InvalidJsonError(f"has no {_KEY} in its metadata")
            found = _read_document(parse_json(metadata.encode()), path)
            sites = tuple(
                _inside(f"sites[{index}]", _site, site, file.get_tensor, found.provenance.threshold)
                for index, site in enumerate(found.sites)
            )
    except (SafetensorError, OSError, InvalidJsonError) as error:
        raise StatisticsFileError(
            f"{path.name} is not a file of outlier statistics: {error!s:.200}",
            hint="Running the model makes such a file.",
        ) from error
    return OutlierStatistics(found.provenance, sites)


@dataclass(frozen=True, slots=True)
class _LinearFields:
    """A linear layer in the document; its weight error is a tensor of the file."""

    name: str
    out_features: int
    in_features: int
    weight_sum_squares: float
    output_mean_square: float
    stored: tuple[int, ...] = ()
    measured_error: float | None = None
    measured_error_stored: float | None = None


@dataclass(frozen=True, slots=True)
class _SiteFields:
    """A site in the document; what it has by dimension are tensors of the file."""

    name: str
    kind: Literal["norm-fed", "attention output", "second feed-forward", "residual"]
    stack: str | None
    layer: int | None
    positions: int
    mean_squared_rowmax: float
    median: float
    linears: tuple[_LinearFields, ...]


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
    return read_as(_Document, document)


def _site(site: _SiteFields, tensor: Callable[[str], Tensor], threshold: float) -> SiteStatistics:
    by_dimension = {name: _vector(tensor, f"{site.name}.{name}") for name in _BY_DIMENSION}
    figures: dict[str, Any] = {**{name: getattr(site, name) for name in _BY_SITE}, **by_dimension}
    inputs = InputSummary(threshold=threshold, **figures)
    for name, found in by_dimension.items():
        if len(found) != inputs.features:
            raise InvalidJsonError(f"{site.name}.{name} has {len(found)} values, not {inputs.features}")
    linears = tuple(
        _inside(f"linears[{index}]", _linear, linear, tensor, inputs.features)
        for index, linear in enumerate(site.linears)
    )
    return SiteStatistics(site.name, site.kind, site.stack, site.layer, inputs, linears)


def _linear(linear: _LinearFields, tensor: Callable[[str], Tensor], features: int) -> LinearStatistics:
    weight_error = _vector(tensor, f"{linear.name}.weight_error")
    if not linear.in_features == features == len(weight_error):
        raise InvalidJsonError(
            f"{linear.name} has {linear.in_features} inputs, {len(weight_error)} errors and a site of {features}"
        )
    if any(column >= features for column in linear.stored):
        raise InvalidJsonError(f"{shown(list(linear.stored))} are not all among {features} inputs", "stored")
    return LinearStatistics(weight_error=weight_error, **_fields(linear))


def _vector(tensor: Callable[[str], Tensor], name: str) -> Tensor:
    found = tensor(name)
    if found.dim() != 1:
        raise InvalidJsonError(f"{name} has the shape {list(found.shape)}, not one dimension")
    return found


def _inside(place: str, read: Callable[..., Read], *arguments: Any) -> Read:
    try:
        return read(*arguments)
    except InvalidJsonError as error:
        raise error.inside(place) from None


def _tensors(statistics: OutlierStatistics) -> Iterator[tuple[str, Tensor]]:
    for site in statistics.sites:
        for name in _BY_DIMENSION:
            yield f"{site.name}.{name}", getattr(site.inputs, name).contiguous()
        for linear in site.linears:
            yield f"{linear.name}.weight_error", linear.weight_error.contiguous()


def _site_to_json(site: SiteStatistics) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "stack": site.stack,
        "layer": site.layer,
        **{name: getattr(site.inputs, name) for name in _BY_SITE},
        "linears": [
            {name: value for name, value in _fields(linear).items() if name != "weight_error"}
            for linear in site.linears
        ],
    }


def _fields(value: Any) -> dict[str, Any]:
    """A slotted dataclass's fields, not copied."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
