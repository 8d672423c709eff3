"""The report on outliers as one HTML page.

Owns which charts and tables it has, and in which order.
"""

from pathlib import Path

from int8cli.checkpoint.writer import write_file
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.suspects import WeightSuspects
from int8cli.report import markup, outlier_charts
from int8cli.report.outliers import grouped_massive, ranges, summary_lines, suspects_caveat
from int8cli.report.vega import require_altair


def write_page(found: OutlierStatistics | WeightSuspects, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError, MissingExtraError."""
    require_altair()
    text = statistics_page(found) if isinstance(found, OutlierStatistics) else suspects_page(found)
    write_file(path, text.encode())


def statistics_page(found: OutlierStatistics) -> str:
    """The page for what a calibration found."""
    features, massive = found.features(), grouped_massive(found.massive())
    of = found.provenance
    threshold = f"{of.threshold:g}"
    lines = summary_lines(found, features, massive)
    drawn = {
        "heatmap": outlier_charts.heatmap(found),
        "features": outlier_charts.features_by_layer(found),
        "magnitudes": outlier_charts.magnitudes_by_layer(found),
        "errors": outlier_charts.errors_by_layer(found),
    }
    body = [
        f"<h1>Outliers of {markup.escape(of.model)}</h1>",
        *(f"<p>{markup.escape(line)}</p>" for line in lines[1:]),
        f'<p class="note">{of.tokens:,} tokens in sequences of {of.sequence_length}, seed {of.seed}, '
        + markup.escape(of.dtype)
        + (f", revision {markup.escape(of.revision)}" if of.revision else "")
        + "</p>",
        markup.section("Layer by dimension", "heatmap", ""),
        markup.section(
            "Features by layer", "features", "The systematic features, and the dimensions that reach furthest."
        ),
        markup.table(
            ("dimension", "stack", "layers", "of", "positions", "at most", "largest", "sign", "in layers"),
            [
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
            ],
            f"No dimension reaches {threshold} in enough layers and positions.",
        ),
        markup.section("Magnitudes", "magnitudes", "The largest |x| of each input, by its kind."),
        "<h2>Massive activations</h2>",
        markup.table(
            ("where", "dimension", "layers", "value", "position", "later"),
            [
                (
                    group.kind,
                    markup.whole(group.dimension),
                    ranges(group.layers),
                    markup.number(group.largest),
                    ranges(group.positions),
                    markup.number(group.later),
                )
                for group in massive
            ],
            "None.",
        ),
        markup.section("Predicted output error", "errors", "Expected ‖error‖ / ‖X Wᵀ‖ of each linear layer."),
        "<h2>Inputs of linear layers</h2>",
        markup.table(
            ("input of", "kind", "layer", "dims over", "values over", "largest", "at", "int8 weights", "vector-wise"),
            [
                (
                    site.name,
                    site.kind,
                    markup.whole(site.layer) if site.layer is not None else (-1.0, ""),
                    markup.whole(int((site.inputs.share_over > 0).sum())),
                    markup.share(site.inputs.share_of_values_over),
                    markup.number(float(site.inputs.absmax.max())),
                    markup.whole(int(site.inputs.absmax.argmax())),
                    markup.number(site.worst_predicted_error(int8_inputs=False)),
                    markup.number(site.worst_predicted_error(int8_inputs=True)),
                )
                for site in found.linear_sites
            ],
            "None.",
        ),
    ]
    return markup.page(f"Outliers of {of.model}", body, drawn)


def suspects_page(found: WeightSuspects) -> str:
    """The page for suspects, called so throughout."""
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
