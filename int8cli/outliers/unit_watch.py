"""The measurements on one unit of a model while sequences pass through it.

Owns which hooks of the engine are used, and which figures make up the statistics of a unit. Does not know about shards
or saved state.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.errors import NonFiniteRunError
from int8cli.llm_int8.columns import choose_columns, column_errors
from int8cli.llm_int8.inputs import InputStatistics, InputSummary, NonFiniteInputError
from int8cli.llm_int8.matmul import DEFAULT_INPUTS
from int8cli.llm_int8.measure import measured_output_errors
from int8cli.llm_int8.quantize import NonFiniteWeightError
from int8cli.llm_int8.scales import scaled
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site, first_hidden, weight_of
from int8cli.outliers.sampled_rows import SampledRows
from int8cli.outliers.statistics import RESIDUAL, LinearStatistics, SiteStatistics, SmoothedLinear
from int8cli.outliers.unit_smoothing import UnitSmoother, UnitSmoothing

_STEP_ELEMENTS = 1 << 22
# How many positions of the last sequence, evenly spaced, are used to measure the error of a linear in int8.
_EXAMPLES = 128
# How many positions of all sequences, evenly spaced, the exponents of a smoothing are chosen by.
_SAMPLES = 1024


class UnitWatch:
    """Measures one unit. If a unit is called several times in a forward pass, measures over all calls."""

    def __init__(
        self, loaded: LoadedUnit, threshold: float, stored_columns: int = 0, smoother: UnitSmoother | None = None
    ) -> None:
        """A value of magnitude `threshold` or more is an outlier.

        With `stored_columns`, the output error of each linear is measured, in int8 alone and with that many columns
        exact. With a `smoother`, the sites of a block are smoothed, where a fold is proved.
        """
        self._threshold, self._stored_columns = threshold, stored_columns
        self._smoother, self._runs = smoother, 0
        self._unit = loaded.unit
        self._inputs: dict[str, InputStatistics] = {}
        self._residual: InputStatistics | None = None
        self._outputs: dict[str, _MeanSquare] = {}
        self._examples: dict[str, Tensor] = {}
        self._samples: dict[str, SampledRows] = {}
        self._weights = {name: _weight_figures(name, linear) for name, linear in loaded.linears.items()}
        self._biases: dict[str, Tensor | None] = {}

    def run(self, loaded: LoadedUnit, on_sequence: Callable[[], None]) -> tuple[SiteStatistics, ...]:
        """Run all sequences through the unit and return its sites. A block also gets a residual site for its output.

        `on_sequence` is called after each sequence.
        """
        self._biases = {name: getattr(linear, "bias", None) for name, linear in loaded.linears.items()}

        def take_output(output: Any) -> None:
            self._take_residual(output)
            on_sequence()

        self._runs += 1
        smoother = self._smoother if self._unit.is_block and self._runs == 1 else None
        sites = loaded.run(
            on_input=self._take_input,
            on_linear_output=self._take_linear_output,
            on_output=take_output,
            repeatable=smoother is not None,
        )
        found = [self._site(site, loaded.linears) for site in sites]
        if smoother is not None:
            found = self._smoothed(smoother, loaded, sites, found)
        if self._residual is not None:
            unit = self._unit
            summary = self._residual.summary()
            found.append(SiteStatistics(unit.name, RESIDUAL, unit.stack, unit.index, summary, ()))
        return tuple(found)

    def _smoothed(
        self, smoother: UnitSmoother, loaded: LoadedUnit, sites: Sequence[Site], found: Sequence[SiteStatistics]
    ) -> list[SiteStatistics]:
        """The sites with what smooths them, and with the columns that are worth storing after that."""
        inputs = {site.name: site.inputs for site in found}
        samples = {name: sampled.rows() for name, sampled in self._samples.items()}
        smoothing = smoother.smoothing(loaded, sites, inputs, samples)
        return [self._after(site, smoothing, loaded.linears) for site in found]

    def _after(self, site: SiteStatistics, unit: UnitSmoothing, modules: Mapping[str, nn.Module]) -> SiteStatistics:
        """A site with its smoothing, and the figures of its linears once they are smoothed."""
        smoothing = unit.found.get(site.name)
        if smoothing is None:
            return dataclasses.replace(site, not_smoothed=unit.reasons.get(site.name, ""))
        site = dataclasses.replace(site, smoothing=smoothing)
        examples = self._examples.get(site.name)
        if examples is not None:
            divisors = smoothing.exponents.to(examples.device)
            examples = scaled(examples, smoothing.steps, columns=divisors, undo=True)
        linears = []
        for linear in site.linears:
            weight = weight_of(modules[linear.name])
            weight = scaled(weight, smoothing.steps, columns=smoothing.exponents.to(weight.device))
            linears.append(self._smoothed_linear(site, linear, examples, weight))
        return dataclasses.replace(site, linears=tuple(linears))

    def _smoothed_linear(
        self, site: SiteStatistics, linear: LinearStatistics, divided: Tensor | None, weight: Tensor
    ) -> LinearStatistics:
        """The linear with its figures in the smoothed model, from its weight with only the columns scaled."""
        errors, sum_squares = column_errors(weight)
        found = dataclasses.replace(linear, smoothed=SmoothedLinear(errors.cpu(), sum_squares))
        if divided is not None:
            summary = dataclasses.replace(site, linears=(found,)).once_smoothed().inputs
            stored = choose_columns(summary, errors.cpu(), self._stored_columns)
            measured = measured_output_errors(divided, weight, stored, DEFAULT_INPUTS)
            found = dataclasses.replace(found, smoothed=SmoothedLinear(errors.cpu(), sum_squares, stored, *measured))
        return found

    def _take_input(self, name: str, x: Tensor) -> None:
        with _naming(f"{name}: its input"):
            self._statistics(name, x).update(x)
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._stored_columns:
            self._examples[name] = rows[:: max(1, rows.shape[0] // _EXAMPLES)][:_EXAMPLES].clone()
        if self._smoother is not None:
            self._samples.setdefault(name, SampledRows(_SAMPLES)).add(rows)

    def _take_residual(self, output: Any) -> None:
        hidden = first_hidden(output)
        if self._unit.is_block and hidden is not None:
            with _naming(f"{self._unit.name}: its output"):
                if self._residual is None:
                    self._residual = self._new(hidden)
                self._residual.update(hidden)

    def _take_linear_output(self, name: str, y: Tensor) -> None:
        self._outputs.setdefault(name, _MeanSquare()).update(y, self._biases[name])

    def _statistics(self, name: str, x: Tensor) -> InputStatistics:
        if name not in self._inputs:
            self._inputs[name] = self._new(x)
        return self._inputs[name]

    def _new(self, x: Tensor) -> InputStatistics:
        return InputStatistics(x.shape[-1], threshold=self._threshold, device=x.device)

    def _site(self, site: Site, modules: Mapping[str, nn.Module]) -> SiteStatistics:
        summary = self._inputs[site.name].summary()
        linears = []
        for name in site.linears:
            linear = dataclasses.replace(self._weights[name], output_mean_square=self._outputs[name].value)
            if self._stored_columns:
                linear = self._measured(linear, summary, self._examples[site.name], weight_of(modules[name]))
            linears.append(linear)
        return SiteStatistics(site.name, site.kind, site.stack, site.layer, summary, tuple(linears))

    def _measured(
        self, linear: LinearStatistics, summary: InputSummary, examples: Tensor, weight: Tensor
    ) -> LinearStatistics:
        """The linear with its error measured in int8 on some inputs, without and with the columns to store."""
        stored = choose_columns(summary, linear.weight_error, self._stored_columns)
        without, with_stored = measured_output_errors(examples, weight, stored, DEFAULT_INPUTS)
        return dataclasses.replace(linear, stored=stored, measured_error=without, measured_error_stored=with_stored)


class _MeanSquare:
    """The mean over positions of the squared length of a linear's output without its bias."""

    def __init__(self) -> None:
        self._sum, self._positions = 0.0, 0

    def update(self, y: Tensor, bias: Tensor | None) -> None:
        rows = y.reshape(-1, y.shape[-1])
        step = max(1, _STEP_ELEMENTS // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            chunk = rows[start : start + step].to(torch.float32, copy=True)  # float32 is changed in place below
            if bias is not None:
                chunk -= bias.float()
            self._sum += float(chunk.square_().sum(dtype=torch.float64))
        self._positions += rows.shape[0]

    @property
    def value(self) -> float:
        return self._sum / max(1, self._positions)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn NonFiniteInputError into an error that says what the value was found in."""
    try:
        yield
    except NonFiniteInputError as error:
        raise NonFiniteRunError(
            f"{what} contains {error.value} at position {error.position:,}, dimension {error.dimension:,}",
            hint="The model overflows there, or a weight before it is damaged.",
        ) from error


def _weight_figures(name: str, linear: nn.Module) -> LinearStatistics:
    weight = weight_of(linear)
    try:
        errors, sum_squares = column_errors(weight)
    except NonFiniteWeightError as error:
        raise NonFiniteRunError(
            f"{name}: its weight contains {error.value} in input column {error.column:,}",
            hint="The checkpoint is damaged there: download the file again.",
        ) from error
    return LinearStatistics(name, weight.shape[0], weight.shape[1], errors.cpu(), sum_squares, 0.0)
