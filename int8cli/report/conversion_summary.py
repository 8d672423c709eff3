"""The end of a conversion on the terminal: one screen with the verdict, the cost, and what to type next."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from int8cli.planning.mixtures import LayoutShare, about_experts
from int8cli.planning.output_files import REPORT_FILE
from int8cli.records.conversion import FROM_WEIGHTS
from int8cli.report.conversion import groups_table
from int8cli.report.smoothing import smoothed_line
from int8cli.report.stored import SUSPECTS, in_sidecars, output_error, percent_more
from int8cli.report.terminal import stdout_console
from int8cli.report.text import escape
from int8cli.results.conversion import ConversionReport
from int8cli.results.units import counted, human_bytes, human_count, human_seconds, percent


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took. `peak_memory_bytes` is None where several processes shared the work."""

    seconds: float
    peak_memory_bytes: int | None


def show_summary(
    report: ConversionReport,
    output: Path,
    cost: Cost,
    *,
    tables: str,
    next_commands: Sequence[str],
    layouts: tuple[LayoutShare, ...] = (),
) -> None:
    """Print the verdict, sizes, errors, cost and next commands.

    `tables` says where its tables are, `layouts` what each layout does with a mixture of experts.
    """
    console = stdout_console()
    console.print(_verdict(report, output), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in _rows(report, output, cost, tables):
        table.add_row(name, text)
    console.print_table(table)
    experts = about_experts(layouts)
    if experts is not None:
        console.print(f"[yellow]{escape(experts)}[/yellow]", soft_wrap=True)
    if not report.layers:
        console.print_table(groups_table("Not quantized", report.left_alone))
    console.print("Next:")
    for command in next_commands:
        console.print(f"  {escape(command)}", soft_wrap=True)


def _verdict(report: ConversionReport, output: Path) -> str:
    name, where = f"[bold]{escape(report.model)}[/bold]", f"[bold]{escape(str(output))}[/bold]"
    if not report.layers:
        return f"{name} was copied to {where}, but [yellow]nothing was quantized[/yellow]."
    ratio = report.source_bytes / report.output_bytes if report.output_bytes else 0.0
    stored = report.stored
    error = stored.total.error if stored is not None else None
    of_outputs = ""
    if error is not None and stored is not None:
        how = "is" if stored.basis == "measured" else "is at most"
        of_outputs = f"; the error of a layer's output {how} {percent(error.with_stored)} on average"
    return f"[green]Done.[/green] {name} is in int8 in {where}, {ratio:.2f} times smaller{of_outputs}."


def _rows(report: ConversionReport, output: Path, cost: Cost, tables: str) -> Iterator[tuple[str, str]]:
    yield "size", f"{human_bytes(report.source_bytes)} → {human_bytes(report.output_bytes)}"
    layers = counted(len(report.layers), "layer")
    yield "int8", f"{report.percent_quantized:.1f} % of {human_count(report.parameters)} parameters, {layers}"
    stored = report.stored
    if stored is not None:
        more = percent_more(report.sidecar_bytes, report.output_bytes)
        size = f"{human_bytes(report.sidecar_bytes)} ({more} more)"
        if stored.total.columns:
            guessed = f"; {SUSPECTS}" if report.settings["outliers"] == FROM_WEIGHTS else ""
            yield "outliers", f"{stored.total.columns:,} exact columns, {size}{guessed}"
        elif report.sidecar_bytes:
            yield "sidecars", f"{in_sidecars(report)}, {size}"
        if stored.total.error is not None:
            yield "output error", f"{output_error(stored)} ({stored.basis}, mean of the layers)"
    smoothing = report.smoothing
    if smoothing is not None:
        yield "smoothed", escape(smoothed_line(smoothing))
    sums = report.sums
    if sums is not None and report.layers:
        yield "weight error", percent(sums.relative_frobenius_error)
    elif report.layers:
        yield "weight error", "not measured"
    memory = f", {human_bytes(cost.peak_memory_bytes)} of memory at the peak" if cost.peak_memory_bytes else ""
    yield "took", f"{human_seconds(cost.seconds)}{memory}"
    if report.passed_over:
        yield "not copied", f"{counted(len(report.passed_over), 'file')}, with the reason in the report"
    yield "report", f"{escape(str(output / REPORT_FILE))}; {tables}"
