"""The report on outliers as one HTML page.

Owns the choice and order of charts and tables.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from int8cli.checkpoint.writer import write_file
from int8cli.outliers.statistics import LocatedFeature, OutlierStatistics, Provenance, SiteStatistics
from int8cli.outliers.suspects import WeightSuspects
from int8cli.report import markup, outlier_charts
from int8cli.report.outliers import MassiveGroup, grouped_massive, ranges, summary_lines, suspects_caveat
from int8cli.report.vega import require_altair


def write_page(found: OutlierStatistics | WeightSuspects, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError, MissingExtraError."""
    require_altair()
    text = statistics_page(found) if isinstance(found, OutlierStatistics) else suspects_page(found)
    write_file(path, text.encode())


def statistics_page(found: OutlierStatistics) -> str:
    """The page for the result of a calibration."""
    features, massive = found.features(), grouped_massive(found.massive())
    model = found.provenance.model
    followed = "The systematic features, and the dimensions with the largest values."
    body = [
        f"<h1>Outliers of {markup.escape(model)}</h1>",
        *(f"<p>{markup.escape(line)}</p>" for line in summary_lines(found, features, massive)[1:]),
        _run_note(found.provenance),
        markup.section("Layer by dimension", "heatmap", ""),
        markup.section("Features by layer", "features", followed),
        _features_table(features, found.provenance.threshold),
        markup.section("Magnitudes", "magnitudes", "The largest |x| of each input, by its kind."),
        "<h2>Massive activations</h2>",
        _massive_table(massive),
        markup.section("Predicted output error", "errors", "Expected ‖error‖ / ‖X Wᵀ‖ of each linear layer."),
        "<h2>Inputs of linear layers</h2>",
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
    return markup.table(heads, rows, f"No dimension reaches {threshold:g} in enough layers and positions.")


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
    return markup.table(("where", "dimension", "layers", "value", "position", "later"), rows, "None.")


def _inputs_table(sites: Sequence[SiteStatistics]) -> str:
    heads = ("input of", "kind", "layer", "dims over", "values over", "largest", "at", "int8 weights", "vector-wise")
    return markup.table(heads, [tuple(_input_cells(site)) for site in sites], "None.")


def _input_cells(site: SiteStatistics) -> Iterator[markup.Cell]:
    yield site.name
    yield site.kind
    yield markup.whole(site.layer) if site.layer is not None else (-1.0, "")
    yield markup.whole(int((site.inputs.share_over > 0).sum()))
    yield markup.share(site.inputs.share_of_values_over)
    yield markup.number(float(site.inputs.absmax.max()))
    yield markup.whole(int(site.inputs.absmax.argmax()))
    yield markup.number(site.worst_predicted_error(int8_inputs=False))
    yield markup.number(site.worst_predicted_error(int8_inputs=True))


def suspects_page(found: WeightSuspects) -> str:
    """The page for suspects."""
    body = [
        f"<h1>Suspects in {markup.escape(found.model)}</h1>",
        f"<p>{markup.escape(suspects_caveat())}</p>",
        markup.section("Layer by dimension", "heatmap", ""),
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
        ),
    ]
    return markup.page(f"Suspects in {found.model}", body, {"heatmap": outlier_charts.suspects_heatmap(found)})
