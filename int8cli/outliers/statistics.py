"""The result of a calibration as objects.

Computes nothing itself; the definitions of outliers are in `llm_int8.outliers`. `statistics_file` reads and writes
these objects.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from int8cli.llm_int8.columns import predicted_output_error
from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.outliers import MassiveActivation, OutlierFeature, massive_activations, systematic_features
from int8cli.llm_int8.smoothing import smoothed_summary

NORM_FED = "norm-fed"
ATTENTION_OUTPUT = "attention output"
SECOND_FEED_FORWARD = "second feed-forward"
RESIDUAL = "residual"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the statistics come from: the source's names for model and revision, the text, and how it was used.

    `model_fingerprint` distinguishes local checkpoints of the same name. `tokens` is the number of tokens that were
    run.
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
class ScaledRows:
    """A tensor of the checkpoint whose rows (out_features, or elements of a norm) are scaled: exponents int8 (rows,).

    They have the opposite sign of those of the columns that the rows make.
    """

    tensor: str
    exponents: Tensor


@dataclass(frozen=True, slots=True)
class SiteSmoothing:
    """The smoothing of a site: inputs divided by scales, columns of its linears multiplied by them.

    exponents: int8 (in_features,), chosen with `alpha`. `scaled` are the tensors that make the divided input.
    `mean_squared_rowmax` is that of some of the divided inputs. `steps` of every exponent are a factor of 2.
    """

    exponents: Tensor
    alpha: float
    scaled: tuple[ScaledRows, ...]
    mean_squared_rowmax: float = 0.0
    steps: Steps = EXACT_STEPS


@dataclass(frozen=True, slots=True)
class SmoothedLinear:
    """The figures of a linear layer once its site is smoothed: those of `LinearStatistics`, of the changed columns."""

    weight_error: Tensor
    weight_sum_squares: float
    stored: tuple[int, ...] = ()
    measured_error: float | None = None
    measured_error_stored: float | None = None


@dataclass(frozen=True, slots=True)
class LinearStatistics:
    """A linear layer: its shape, ||dW_:j||² by input column (in,), ||W||², and the measured E||X Wᵀ||² without bias.

    If the layer was also run in int8: the columns that were exact, and its relative output error without and with
    them. `smoothed` has these figures once its site is smoothed.
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
    smoothed: SmoothedLinear | None = None


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """An input that `linears` share. `kind` is one of the four names above; a residual site has no linears.

    `stack` and `layer` say which block it is in. Both are None outside the blocks. `smoothing` is there if the
    calibration looked for one, and found and proved it; the other figures are those of the unsmoothed model. If it
    looked and found none, `not_smoothed` says why.
    """

    name: str
    kind: str
    stack: str | None
    layer: int | None
    inputs: InputSummary
    linears: tuple[LinearStatistics, ...]
    smoothing: SiteSmoothing | None = None
    not_smoothed: str = ""

    def once_smoothed(self) -> "SiteStatistics":
        """The site of the smoothed model: its inputs divided, its linears with their figures after it."""
        if self.smoothing is None:
            return self
        inputs = smoothed_summary(self.inputs, self.smoothing.exponents, self.smoothing.steps)
        inputs = replace(inputs, mean_squared_rowmax=self.smoothing.mean_squared_rowmax)
        return replace(self, inputs=inputs, linears=tuple(_once_smoothed(linear) for linear in self.linears))

    def predicted_error(self, linear: LinearStatistics, *, int8_inputs: bool, exact: tuple[int, ...] = ()) -> float:
        """Relative output error of one of the linears with int8 weights and, if `int8_inputs`, int8 inputs by row."""
        return predicted_output_error(
            self.inputs.mean_square,
            linear.weight_error,
            linear.output_mean_square,
            mean_squared_rowmax=self.inputs.mean_squared_rowmax if int8_inputs else 0.0,
            weight_sum_squares=linear.weight_sum_squares if int8_inputs else 0.0,
            exact=exact,
        )

    def worst_predicted_error(self, *, int8_inputs: bool) -> float:
        """The largest error of its linears."""
        return max((self.predicted_error(linear, int8_inputs=int8_inputs) for linear in self.linears), default=0.0)


def _once_smoothed(linear: LinearStatistics) -> LinearStatistics:
    found = linear.smoothed
    if found is None:
        return linear
    return replace(
        linear,
        weight_error=found.weight_error,
        weight_sum_squares=found.weight_sum_squares,
        stored=found.stored,
        measured_error=found.measured_error,
        measured_error_stored=found.measured_error_stored,
    )


@dataclass(frozen=True, slots=True)
class LocatedFeature:
    """A systematic outlier feature, the layers it is in, and the number of layers in its stack."""

    stack: str
    feature: OutlierFeature
    layers: tuple[int, ...]
    layer_count: int


@dataclass(frozen=True, slots=True)
class LocatedActivation:
    """A massive activation and its site."""

    site: SiteStatistics
    activation: MassiveActivation


@dataclass(frozen=True, slots=True)
class OutlierStatistics:
    """Everything that one calibration found. The sites are in the order in which the model computes them."""

    provenance: Provenance
    sites: tuple[SiteStatistics, ...]

    @property
    def linear_sites(self) -> tuple[SiteStatistics, ...]:
        return tuple(site for site in self.sites if site.linears)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream: the most common width of norm-fed sites."""
        widths = [site.inputs.features for site in self.sites if site.kind == NORM_FED]
        return max(sorted(set(widths)), key=widths.count) if widths else 0

    def norm_fed_layers(self) -> dict[str, dict[int, tuple[SiteStatistics, ...]]]:
        """The norm-fed sites as wide as the residual stream, by stack and layer."""
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
