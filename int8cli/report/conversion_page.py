"""The report of a conversion as one HTML page, or as a picture of its charts.

Owns which charts and tables there are, their order, and the sentences at the top.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from int8cli.checkpoint.writer import write_file
from int8cli.errors import OutputError
from int8cli.report import markup
from int8cli.report.conversion_charts import (
    EXACT,
    PLAIN,
    WEIGHTS,
    columns_drawn,
    columns_map,
    errors_by_depth,
    errors_by_kind,
    errors_of,
    has_errors,
)
from int8cli.report.conversion_columns import repeated_columns
from int8cli.report.outliers import ranges
from int8cli.report.smoothing import smoothed_line
from int8cli.report.stored import SUSPECTS, chosen_by, in_sidecars, percent_more
from int8cli.report.vega import finished, require_altair, save_chart, stacked
from int8cli.results.conversion import ConversionReport, LayerReport, summarize_kinds
from int8cli.results.stored_columns import StoredSummary
from int8cli.results.units import counted, human_bytes, human_count, percent

MOST_LAYERS = 1500
MOST_REPEATED = 40
_ERROR_NOTE = (
    "Relative error of the weights: ‖W - Ŵ‖ / ‖W‖, W as in the source, Ŵ as stored. Of the outputs: ‖Y - Ŷ‖ / ‖Y‖, "
    "Y = X Wᵀ, with inputs X that the model gave to this layer. "
)


def write_conversion(report: ConversionReport, path: Path) -> None:
    """Write the page (.html) or the picture (.png, .svg). Raises OutputError, MissingExtraError."""
    require_altair()
    if path.suffix == ".html":
        write_file(path, conversion_page(report).encode())
    elif path.suffix in (".png", ".svg"):
        charts = [errors_by_kind(report), errors_by_depth(report)] if has_errors(report) else []
        charts += [columns_map(report)] if columns_drawn(report) else []
        save_chart(stacked(charts, "no error was measured"), path)
    else:
        raise OutputError(f"{path}: the report of a conversion must be .html, .png or .svg")


def conversion_page(report: ConversionReport) -> str:
    """The page: the verdict, sizes, the charts that have data, what was left alone, every layer."""
    drawn: dict[str, Any] = {}
    body = [
        f"<h1>{markup.escape(report.model)} in int8</h1>",
        *(f'<p class="verdict">{markup.escape(line)}</p>' for line in [" ".join(verdict_lines(report))]),
        markup.heading("Size"),
        _size_table(report),
    ]
    if has_errors(report):
        body += _error_sections(report, drawn)
    elif report.layers:
        body.append('<p class="note">The errors of the layers were not measured.</p>')
    if columns_drawn(report):
        body += _column_sections(report, drawn)
    body += _left_alone(report)
    body += [markup.heading("Every layer in int8"), *_layers_table(report)]
    body += [markup.heading("How it was converted"), _settings_table(report)]
    return markup.page(f"{report.model} in int8", body, drawn)


def verdict_lines(report: ConversionReport) -> list[str]:
    """The result in plain words: what became smaller, what it costs, and where it costs most."""
    if not report.layers:
        return ["Nothing was quantized: the output is a copy of the model. The reasons are below."]
    ratio = report.source_bytes / report.output_bytes if report.output_bytes else 0.0
    lines = [
        f"The model is {ratio:.2f} times smaller: {human_bytes(report.source_bytes)} became "
        f"{human_bytes(report.output_bytes)}, and {report.percent_quantized:.0f} % of its parameters are in int8."
    ]
    stored = report.stored
    error = stored.total.error if stored is not None else None
    if error is not None and stored is not None:
        how = "differs" if stored.basis == "measured" else "differs at most"
        without = f"; without the exact columns it would be {percent(error.all_int8)}" if stored.total.columns else ""
        lines.append(
            f"The output of an average layer {how} by {percent(error.with_stored)} from that in 16 bit{without}."
        )
    elif report.sums is not None:
        lines.append(
            f"The weights differ by {percent(report.sums.relative_frobenius_error)} from the original. What that does "
            "to a layer's output was not measured."
        )
    worst = _worst(report)
    if worst is not None:
        layer, of, value = worst
        lines.append(f"The largest error is {percent(value)}, in the {of} of {layer.name}.")
    return lines


def _worst(report: ConversionReport) -> tuple[LayerReport, str, float] | None:
    """The layer with the largest error: of its output as loaded with exact columns if known, otherwise its weights."""
    for key, of in ((EXACT, "output"), (WEIGHTS, "weights")):
        known = [(layer, errors[key]) for layer in report.layers if key in (errors := errors_of(report, layer))]
        if known:
            layer, value = max(known, key=lambda pair: pair[1])
            return layer, of, value
    return None


def _size_table(report: ConversionReport) -> str:
    rows: list[Sequence[markup.Cell]] = [
        ("weight files", markup.size(report.source_bytes), markup.size(report.output_bytes)),
        ("parameters in int8", markup.NOTHING, _counted(report.quantized_parameters)),
        ("all parameters", _counted(report.parameters), _counted(report.parameters)),
    ]
    if report.stored is not None:
        beside = "exact columns" if report.stored.total.columns else in_sidecars(report)
        rows.insert(1, (f"{beside}, beside them", markup.NOTHING, markup.size(report.sidecar_bytes)))
    before = sum(layer.bytes_before for layer in report.layers)
    after = sum(layer.bytes_after for layer in report.layers)
    rows.insert(1, ("of these, layers in int8", markup.size(before), markup.size(after)))
    return markup.table(("", "before", "after"), rows, "", name="Size before and after")


def _counted(parameters: int) -> markup.Cell:
    return float(parameters), human_count(parameters)


def _error_sections(report: ConversionReport, drawn: dict[str, Any]) -> Iterator[str]:
    stored = report.stored
    note = _ERROR_NOTE
    if stored is not None and stored.basis is not None:
        inputs = "Inputs are int8 too. Plain int8: every column is rounded. With exact columns: those stored are not. "
        note += inputs + ("Outputs are measured." if stored.basis == "measured" else "Outputs are predicted.")
    by_kind = ". ".join(f"{kind}: {text}" for kind, text in _spoken_kinds(report))
    yield markup.section("Error by kind of layer", "kinds", note, f"Error by kind of layer. {by_kind}.")
    drawn["kinds"] = finished(errors_by_kind(report))
    yield _kinds_table(report, stored)
    depth = "A panel for each place in a block, block by block. The scale is logarithmic and the same in all panels."
    yield markup.section(
        "Error by depth", "depth", depth, f"Error by depth. {depth} The table of layers has its figures."
    )
    drawn["depth"] = finished(errors_by_depth(report))


def _spoken_kinds(report: ConversionReport) -> Iterator[tuple[str, str]]:
    """What a screen reader says of each kind."""
    stored = report.stored
    outputs = {kind.kind: kind.error for kind in stored.kinds} if stored is not None else {}
    for kind in summarize_kinds(report.layers):
        parts = [] if kind.sums is None else [f"weights {percent(kind.sums.relative_frobenius_error)}"]
        error = outputs.get(kind.kind)
        if error is not None:
            parts.append(f"outputs {percent(error.all_int8)}, with exact columns {percent(error.with_stored)}")
        yield kind.kind, ", ".join(parts) or "not measured"


def _kinds_table(report: ConversionReport, stored: StoredSummary | None) -> str:
    by_kind = {kind.kind: kind for kind in stored.kinds} if stored is not None else {}
    measured = _measured(report)
    heads = ("kind", *measured, "exact columns", "layers", "before", "after")
    rows = []
    for kind in summarize_kinds(report.layers):
        of = by_kind.get(kind.kind)
        error = of.error if of is not None else None
        errors = {
            EXACT: None if error is None else error.with_stored,
            PLAIN: None if error is None else error.all_int8,
            WEIGHTS: None if kind.sums is None else kind.sums.relative_frobenius_error,
        }
        rows.append(
            (
                kind.kind,
                *(markup.share(errors[of_what]) for of_what in measured),
                markup.whole(0 if of is None else of.columns),
                markup.whole(kind.layers),
                markup.size(kind.bytes_before),
                markup.size(kind.bytes_after),
            )
        )
    return markup.table(heads, rows, "None.", name="Kinds of layers")


def _column_sections(report: ConversionReport, drawn: dict[str, Any]) -> Iterator[str]:
    stored = report.stored
    assert stored is not None
    total = stored.total
    more = percent_more(report.sidecar_bytes, report.output_bytes)
    drawn_columns = columns_drawn(report)
    note = (
        f"{counted(total.columns, 'input column')} of {counted(total.layers, 'layer')} are also stored exactly, in the "
        f"dtype of the source: {more} more bytes. They meet the inputs whose values are so large that int8 loses them. "
        "A column that appears in most blocks is an outlier feature of the model. The stronger a mark, the more of its "
        f"layer's error the column would cause in int8. They were {chosen_by(report.settings)}."
    )
    if drawn_columns < total.columns:
        note += f" The map shows the {drawn_columns:,} with the largest share."
    yield markup.section("Exact columns", "columns", note, f"Map of the exact columns. {note}")
    drawn["columns"] = finished(columns_map(report))
    rows = [
        (
            found.role,
            markup.whole(found.column),
            markup.whole(len(found.blocks)),
            ranges(found.blocks),
            markup.number(found.absmax),
            markup.share(found.mean_share),
        )
        for found in repeated_columns(report)[:MOST_REPEATED]
    ]
    heads = ("input of", "column", "blocks", "which", "largest |x|", "share of the error, mean")
    yield markup.heading("Columns that are exact in several blocks")
    yield markup.table(heads, rows, "No column is stored in more than one block.", name="Repeated columns")


def _left_alone(report: ConversionReport) -> Iterator[str]:
    yield markup.heading("Left as it was", "Tensors that keep their dtype, with the reason.")
    rows = [
        (
            group.kind.removesuffix(".weight"),
            markup.whole(group.tensors),
            _counted(group.parameters),
            markup.size(group.bytes),
            group.reason,
        )
        for group in report.left_alone
    ]
    yield markup.table(("kind", "tensors", "parameters", "size", "why"), rows, "Nothing.", name="Left as it was")
    if report.passed_over:
        yield markup.heading("Files that were not copied")
        yield markup.table(("file", "why"), list(report.passed_over), "None.", name="Files that were not copied")
    if report.unmatched_patterns:
        patterns = ", ".join(report.unmatched_patterns)
        yield f'<p class="note">Patterns that matched nothing: {markup.escape(patterns)}</p>'


def _layers_table(report: ConversionReport) -> Iterator[str]:
    """Every layer, the largest error first; if there are very many, those with the largest errors."""
    layers = sorted(report.layers, key=lambda layer: -max(errors_of(report, layer).values(), default=0.0))
    if len(layers) > MOST_LAYERS:
        note = f"The {MOST_LAYERS:,} largest errors of {len(layers):,} layers. int8/report.json has all."
        yield f'<p class="note">{note}</p>'
    measured = _measured(report)
    heads = ("layer", *measured, "exact columns", "out × in", "before", "after")
    rows = [_layer_cells(layer, errors_of(report, layer), measured) for layer in layers[:MOST_LAYERS]]
    yield markup.table(heads, rows, "None.", name="Every layer in int8")


def _layer_cells(layer: LayerReport, errors: Mapping[str, float], measured: Sequence[str]) -> tuple[markup.Cell, ...]:
    return (
        layer.name,
        *(markup.share(errors.get(of)) for of in measured),
        markup.whole(len(layer.stored.columns) if layer.stored is not None else 0),
        f"{layer.shape[0]:,} × {layer.shape[1]:,}",
        markup.size(layer.bytes_before),
        markup.size(layer.bytes_after),
    )


def _measured(report: ConversionReport) -> tuple[str, ...]:
    """The errors that any layer has: first the one that a user gets. On a phone, only the first columns are seen."""
    known = {of for layer in report.layers for of in errors_of(report, layer)}
    return tuple(of for of in (EXACT, PLAIN, WEIGHTS) if of in known)


def _settings_table(report: ConversionReport) -> str:
    settings = report.settings
    rows = [("revision", report.revision or "none"), ("layout", settings["layout"])]
    rows += [("threshold", f"{settings['threshold']:g}"), ("float32 weights", settings["float32"])]
    rows += [("skip", ", ".join(settings["skip"]) or "none"), ("only", ", ".join(settings["only"]) or "all")]
    how = "not stored" if report.stored is None else chosen_by(settings)
    rows += [("exact columns", how if how != SUSPECTS else f"suspects: {SUSPECTS}"), ("shards", f"{report.shards:,}")]
    rows += [("smoothed", smoothed_line(report.smoothing) if report.smoothing is not None else "nothing")]
    return markup.table(("setting", "value"), rows, "", name="How it was converted")
