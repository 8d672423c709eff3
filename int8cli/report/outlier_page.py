"""The report on outliers as one HTML page.

Owns the choice and order of charts and tables.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from int8cli.checkpoint.writer import write_file
from int8cli.llm_int8.outliers import LAYER_SHARE, POSITION_SHARE
from int8cli.outliers.statistics import LocatedFeature, OutlierStatistics, Provenance, SiteStatistics
from int8cli.outliers.suspects import WeightSuspects
from int8cli.report import markup, outlier_charts
from int8cli.report.outliers import MassiveGroup, grouped_massive, ranges, summary_lines, suspects_caveat
from int8cli.report.vega import require_altair

NORM_FED_MEANS = (
    "Norm-fed inputs are those that a linear layer gets straight from a norm, such as the inputs of query, key and "
    "value projections. They have the dimensions of the residual stream, so one can be followed through the layers."
)
FEATURES_MEAN = (
    f"An outlier feature is a dimension in which |x| reaches the threshold in at least {LAYER_SHARE:.0%} of the layers "
    f"and {POSITION_SHARE:.0%} of the positions. Drawn are these, or else the dimensions with the largest values."
)
KINDS_MEAN = (
    "Attention output: what attention hands to its output projection. Second feed-forward: what comes out of the "
    "activation function. Residual: what a block hands to the next one; no linear layer gets it as it is."
)
MASSIVE_MEANS = (
    "A massive activation is a single value of at least 100 that is a thousand times the median around it, mostly at "
    "the first token. Later: the largest |x| in that dimension after the first position."
)
ERRORS_MEAN = (
    "How much int8 will change the output of each linear layer, ‖error‖ / ‖X Wᵀ‖, predicted from its inputs. "
    "Vector-wise int8 rounds inputs too, with one scale for each token and one for each row of W, and sets no column "
    "apart."
)
SUSPECTS_MEAN = (
    "A suspect is a dimension whose values the weights alone suggest to be large: the gain of a norm, times what the "
    "layers before it write into that dimension. Each cell is that product, relative to the other dimensions."
)
INPUTS_MEAN = (
    "Dims over: dimensions that reach the threshold somewhere. Values over: the share of all values that do. At: the "
    "dimension of the largest. The last two are the predicted output errors of the worst layer that has this input."
)


def _heatmap_means(threshold: float) -> str:
    return (
        f"Each cell is the largest |x| in one dimension of one layer; steps double, and red is {threshold:g} or more."
    )


def write_page(found: OutlierStatistics | WeightSuspects, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError, MissingExtraError."""
    require_altair()
    text = statistics_page(found) if isinstance(found, OutlierStatistics) else suspects_page(found)
    write_file(path, text.encode())


def statistics_page(found: OutlierStatistics) -> str:
    """The page for the result of a calibration."""
    features, massive = found.features(), grouped_massive(found.massive())
    model = found.provenance.model
    body = [
        f"<h1>Outliers of {markup.escape(model)}</h1>",
        *(f"<p>{markup.escape(line)}</p>" for line in summary_lines(found, features, massive)[1:]),
        _run_note(found.provenance),
        markup.section(
            "Layer by dimension", "heatmap", f"{NORM_FED_MEANS} {_heatmap_means(found.provenance.threshold)}"
        ),
        markup.section("Features by layer", "features", FEATURES_MEAN),
        _features_table(features, found.provenance.threshold),
        markup.section("Magnitudes", "magnitudes", f"The largest |x| of each input, by its kind. {KINDS_MEAN}"),
        markup.heading("Massive activations", MASSIVE_MEANS),
        _massive_table(massive),
        markup.section("Predicted output error", "errors", ERRORS_MEAN),
        markup.heading("Inputs of linear layers", INPUTS_MEAN),
        _inputs_table(found.linear_sites),
    ]
    drawn = {
        "heatmap": outlier_charts.heatmap(found),
        "features": outlier_charts.features_by_layer(found),
        "magnitudes": outlier_charts.magnitudes_by_layer(found),
        "errors": outlier_charts.errors_by_layer(found),
    }
    return markup.page(f"Outliers of {model}", body, drawn)


def _run_note(run: Provenance) -> str:
    revision = f", revision {markup.escape(run.revision)}" if run.revision else ""
    return (
        f'<p class="note">{run.tokens:,} tokens in sequences of {run.sequence_length}, seed {run.seed}, '
        f"{markup.escape(run.dtype)}{revision}</p>"
    )


def _features_table(features: Sequence[LocatedFeature], threshold: float) -> str:
    heads = ("dimension", "stack", "layers", "of", "positions", "at most", "largest", "sign", "in layers")
    rows = [
        (
            markup.whole(located.feature.dimension),
            located.stack,
            markup.whole(len(located.layers)),
            markup.whole(located.layer_count),
            markup.share(located.feature.position_share),
            markup.share(located.feature.peak_share),
            markup.number(located.feature.largest),
            located.feature.sign,
            ranges(located.layers),
        )
        for located in features
    ]
    return markup.table(
        heads, rows, f"No dimension reaches {threshold:g} in enough layers and positions.", name="Features"
    )


def _massive_table(massive: Sequence[MassiveGroup]) -> str:
    rows = [
        (
            group.kind,
            markup.whole(group.dimension),
            ranges(group.layers),
            markup.number(group.largest),
            ranges(group.positions),
            markup.number(group.later),
        )
        for group in massive
    ]
    return markup.table(
        ("where", "dimension", "layers", "value", "position", "later"), rows, "None.", name="Massive activations"
    )


def _inputs_table(sites: Sequence[SiteStatistics]) -> str:
    heads = ("input of", "kind", "layer", "dims over", "values over", "largest", "at", "int8 weights", "vector-wise")
    return markup.table(heads, [tuple(_input_cells(site)) for site in sites], "None.", name="Inputs")


def _input_cells(site: SiteStatistics) -> Iterator[markup.Cell]:
    yield site.name
    yield site.kind
    yield markup.whole(site.layer) if site.layer is not None else (-1.0, "")
    yield markup.whole(int((site.inputs.share_over > 0).sum()))
    yield markup.share(site.inputs.share_of_values_over)
    yield markup.number(float(site.inputs.absmax.max()))
    yield markup.whole(int(site.inputs.absmax.argmax()))
    yield markup.share(site.worst_predicted_error(int8_inputs=False))
    yield markup.share(site.worst_predicted_error(int8_inputs=True))


def suspects_page(found: WeightSuspects) -> str:
    """The page for suspects."""
    body = [
        f"<h1>Suspects in {markup.escape(found.model)}</h1>",
        f"<p>{markup.escape(suspects_caveat())}</p>",
        markup.section("Layer by dimension", "heatmap", SUSPECTS_MEAN),
        "<h2>Suspects</h2>",
        markup.table(
            ("dimension", "predicted score", "layers", "of", "in layers"),
            [
                (
                    markup.whole(suspect.dimension),
                    markup.number(suspect.score),
                    markup.whole(len(suspect.layers)),
                    markup.whole(suspect.layer_count),
                    ranges(suspect.layers),
                )
                for suspect in found.suspects
            ],
            "None.",
            name="Suspects",
        ),
    ]
    return markup.page(f"Suspects in {found.model}", body, {"heatmap": outlier_charts.suspects_heatmap(found)})
