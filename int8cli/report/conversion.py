"""The report of a conversion on the terminal."""

from pathlib import Path

from rich.table import Table

from int8cli.llm_int8.metrics import ErrorSums
from int8cli.planning.output_files import SIDECAR_DIRECTORY
from int8cli.report.smoothing import smoothed_line
from int8cli.report.stored import chosen_by, how_many, in_sidecars, output_error, percent_more
from int8cli.report.terminal import stdout_console, titled_table
from int8cli.report.text import escape
from int8cli.results.conversion import (
    ConversionReport,
    LayerReport,
    TensorGroup,
    summarize_kinds,
    worst_by_output_error,
)
from int8cli.results.stored_columns import ErrorBasis, StoredColumn, StoredSummary
from int8cli.results.units import counted, decibels, human_bytes, human_count

WORST_LAYERS = 10
COLUMNS_SHOWN = 8  # of one layer


def show_report(report: ConversionReport, output: Path) -> None:
    """Print totals, the error by kind of layer, the worst layers, and what was not quantized.

    The output error comes first if it is known. The weight error follows if it was measured; its worst layers are shown
    only if the output error is unknown.
    """
    console = stdout_console()
    console.print(_headline(report, output), soft_wrap=True)
    stored = report.stored
    for line in _stored_lines(report, stored) if stored is not None else ():
        console.print(line)
    if report.smoothing is not None:
        console.print(f"Smoothed: {escape(smoothed_line(report.smoothing))}")
    if stored is not None and stored.basis is not None:
        console.print_table(_output_error_table(stored, stored.basis))
        console.print_table(_worst_output_table(report.layers, stored.basis))
    if report.layers:
        console.print_table(_kinds_table(report))
        if report.sums is not None and (stored is None or stored.basis is None):
            console.print_table(_worst_table(report.layers[:WORST_LAYERS]))
    console.print_table(groups_table("Not quantized", report.left_alone))
    for file, reason in report.passed_over:
        console.print(f"[dim]not copied:[/dim] {escape(file)} [dim]({escape(reason)})[/dim]", soft_wrap=True)


def groups_table(title: str, groups: tuple[TensorGroup, ...]) -> Table:
    """Kinds of tensors, with the reason for each decision."""
    table = titled_table(title)
    table.add_column("kind", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why")
    for group in groups:
        table.add_row(
            escape(group.kind.removesuffix(".weight")),
            str(group.tensors),
            human_bytes(group.bytes),
            escape(group.reason),
        )
    return table


def _headline(report: ConversionReport, output: Path) -> str:
    total = report.sums
    ratio = report.source_bytes / report.output_bytes if report.output_bytes else 0.0
    lines = [
        f"[bold]{escape(report.model)}[/bold] → [bold]{escape(str(output))}[/bold]",
        f"{human_bytes(report.source_bytes)} → {human_bytes(report.output_bytes)}, {ratio:.2f} times smaller; "
        f"{report.percent_quantized:.1f} % of {human_count(report.parameters)} parameters in int8",
    ]
    layers = counted(len(report.layers), "layer")
    if not report.layers:
        lines.append("[yellow]Nothing was quantized. The reasons are below.[/yellow]")
    elif total is None:
        lines.append(f"{layers}; weight error not measured")
    else:
        lines.append(
            f"{layers}: relative weight error {total.relative_frobenius_error:.4f}, SQNR {decibels(total.sqnr_db)} dB"
        )
    return "\n".join(lines)


def _stored_lines(report: ConversionReport, stored: StoredSummary) -> list[str]:
    size, more = human_bytes(report.sidecar_bytes), percent_more(report.sidecar_bytes, report.output_bytes)
    exact = f"{how_many(report, stored)} stored exactly" if stored.total.columns else in_sidecars(report)
    lines = [
        f"{exact} in {SIDECAR_DIRECTORY}: {size}, {more} more",
        f"[dim]{escape(chosen_by(report.settings))}[/dim]",
    ]
    if stored.total.error is not None:
        whose = "Mean layer" if stored.basis == "measured" else "Predicted"
        lines.append(f"{whose} output error: {output_error(stored, '[bold]{}[/bold]')}")
    return lines


def _output_error_table(stored: StoredSummary, basis: ErrorBasis) -> Table:
    table = titled_table(f"Output error ({basis}), by kind of layer")
    table.add_column("kind", no_wrap=True)
    table.add_column("layers", justify="right", no_wrap=True)
    table.add_column("columns", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("all int8", justify="right", no_wrap=True)
    table.add_column("exact", justify="right", no_wrap=True)
    for kind in stored.kinds:
        error = kind.error
        table.add_row(
            escape(kind.kind),
            str(kind.layers),
            f"{kind.columns:,}",
            human_bytes(kind.bytes),
            f"{error.all_int8:.4f}" if error is not None else "-",
            f"{error.with_stored:.4f}" if error is not None else "-",
        )
    at_most = "" if basis == "measured" else ", at most"
    table.caption = f"‖error‖/‖X Wᵀ‖, mean of the layers · exact: with exact columns{at_most}"
    return table


def _worst_output_table(layers: tuple[LayerReport, ...], basis: ErrorBasis) -> Table:
    worst = worst_by_output_error(layers, basis)[:WORST_LAYERS]
    table = titled_table("Worst layers by output error" if len(worst) == WORST_LAYERS else "Layers, by output error")
    table.add_column("layer", no_wrap=True)
    table.add_column("all int8", justify="right", no_wrap=True)
    table.add_column("exact", justify="right", no_wrap=True)
    table.add_column("columns")
    for layer, error in worst:
        table.add_row(
            escape(layer.name),
            f"{error.all_int8:.4f}",
            f"{error.with_stored:.4f}",
            _in_a_line(layer.stored.heaviest_first if layer.stored is not None else ()),
        )
    table.caption = "columns: those stored exactly, largest share of the error first"
    return table


def _in_a_line(columns: tuple[StoredColumn, ...]) -> str:
    text = " ".join(str(column.index) for column in columns[:COLUMNS_SHOWN])
    return f"{text} …" if len(columns) > COLUMNS_SHOWN else text


def _kinds_table(report: ConversionReport) -> Table:
    table = titled_table("Quantized, by kind of layer")
    table.add_column("kind", no_wrap=True)
    measured = report.sums is not None
    for figure in ("layers", "before", "after", *(("error", "dB", "range") if measured else ())):
        table.add_column(figure, justify="right", no_wrap=True)
    for kind in summarize_kinds(report.layers):
        table.add_row(
            escape(kind.kind),
            str(kind.layers),
            human_bytes(kind.bytes_before),
            human_bytes(kind.bytes_after),
            *(_error_cells(kind.sums) if kind.sums is not None else ()),
        )
    if measured:
        table.caption = "error: ‖W-Ŵ‖/‖W‖ · dB: SQNR · range: mean use of the int8 range"
    return table


def _error_cells(sums: ErrorSums) -> tuple[str, str, str]:
    return f"{sums.relative_frobenius_error:.4f}", decibels(sums.sqnr_db), f"{100 * sums.mean_range_use:.0f} %"


def _worst_table(layers: tuple[LayerReport, ...]) -> Table:
    table = titled_table("Worst layers" if len(layers) == WORST_LAYERS else "Layers, worst first")
    table.add_column("layer", no_wrap=True)
    table.add_column("out x in", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("dB", justify="right", no_wrap=True)
    table.add_column("max err", justify="right", no_wrap=True)
    table.add_column("absmax", justify="right", no_wrap=True)
    for layer, sums in ((each, each.sums) for each in layers if each.sums is not None):
        table.add_row(
            escape(layer.name),
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{sums.relative_frobenius_error:.4f}",
            decibels(sums.sqnr_db),
            f"{sums.max_abs_error:.2g}",
            f"{sums.row_absmax_min:.2g}-{sums.row_absmax_max:.2g}",
        )
    table.caption = "max err: max |w-ŵ| · absmax: smallest and largest row_absmax"
    return table
