"""Which cards hold a model, on the terminal: a verdict and a placement for each machine, or the usual cards."""

from collections.abc import Iterator

from rich.table import Table

from int8cli.estimate.answers import MachineAnswer, MemoryReport
from int8cli.estimate.cards import GIB, USABLE_RULE, Placed
from int8cli.estimate.estimate import FLOAT16, INT8, PRECISIONS, Use
from int8cli.estimate.fit import Answer, Count, FitRow
from int8cli.estimate.shortage import Shortage
from int8cli.report.terminal import PrintingConsole, titled_table
from int8cli.report.text import escape
from int8cli.results.units import human_bytes

_NOT_KNOWN = "?"
LABELS = {FLOAT16: "float16", INT8: "int8"}


def show_cards(console: PrintingConsole, report: MemoryReport) -> None:
    """Print this machine, the machines that were named and, if none was, the usual cards."""
    machines = ([report.here] if report.here is not None else []) + list(report.asked)
    for machine in machines:
        console.print()
        for line in _verdicts(machine, report):
            console.print(line, soft_wrap=True)
        console.print_table(_placement_table(machine.answers[-1]))
        if machine.shortage is not None:
            for line in _shortage_lines(machine.shortage):
                console.print(line, soft_wrap=True)
    if not report.asked:
        console.print()
        console.print_table(_fit_table(report))
        console.print(
            f"[dim]in use: with {tokens_in_words(report.use)} · -: too small for one layer[/dim]", soft_wrap=True
        )
        if len(list(_rows_that_differ(report.table))) < len(report.table):
            console.print("[dim]One card is enough if it is larger than these.[/dim]")
    console.print(f"[dim]{USABLE_RULE}[/dim]", soft_wrap=True)


def _shortage_lines(missing: Shortage) -> Iterator[str]:
    """What would do: more such cards, RAM, a disk."""
    if missing.cards_needed is not None:
        yield f"  {missing.cards_needed} x {escape(missing.card)} hold it in int8 with this context"
    if missing.offloaded_bytes:
        size = human_bytes(missing.offloaded_bytes)
        yield f"  {size} of int8 weights left over; a loader that keeps them elsewhere reads them for each token:"
        here = ""
        if missing.ram_bytes is not None:
            enough = "enough" if missing.ram_bytes >= missing.offloaded_bytes else "too little"
            here = f"; this machine has {human_bytes(missing.ram_bytes)} free, {enough}"
        yield f"    from RAM   at most {_rate(missing.ram_tokens_a_second)} tokens/s (25 GB/s, PCIe 4.0 x16){here}"
        yield f"    from disk  at most {_rate(missing.disk_tokens_a_second)} tokens/s (3 GB/s, NVMe)"


def _rate(tokens_a_second: float) -> str:
    return f"{tokens_a_second:.2g}"


def gib(count: float) -> str:
    """`7.66 GiB`; below a tenth of one, MiB."""
    if not count:
        return "0"
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        value = count / size
        if abs(value) >= 0.0995 or unit == "KiB":
            return f"{value:,.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f} {unit}"
    raise AssertionError


def _fit_table(report: MemoryReport) -> Table:
    table = titled_table("Cards needed (whole layers per card)")
    table.add_column("", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for precision in PRECISIONS:
        table.add_column(f"{LABELS[precision]}\nweights", justify="right", no_wrap=True)
        table.add_column("\nin use", justify="right", no_wrap=True)
    known = report.estimate.cache.layers is not None
    for row in _rows_that_differ(report.table):
        cells = [cell for name in PRECISIONS for cell in _count_cells(row.counts[name], known=known)]
        best = row.counts[INT8].in_use if known else row.counts[INT8].weights
        table.add_row(escape(row.card.name), gib(row.card.total_bytes), *cells, style="green" if best == 1 else "")
    return table


def _rows_that_differ(table: tuple[FitRow, ...]) -> Iterator[FitRow]:
    """Up to the first card that is large enough alone: larger cards are too."""
    for row in table:
        yield row
        if all(count.weights == count.in_use == 1 for count in row.counts.values()):
            return


def _count_cells(count: Count, *, known: bool) -> tuple[str, str]:
    weights = "-" if count.weights is None else str(count.weights)
    in_use = _NOT_KNOWN if not known else "-" if count.in_use is None else str(count.in_use)
    return weights, in_use


def tokens_in_words(use: Use) -> str:
    """`2,048 tokens`, `4 x 2,048 tokens`."""
    return f"{use.batch} x {use.context:,} tokens" if use.batch > 1 else f"{use.context:,} tokens"


def _verdicts(machine: MachineAnswer, report: MemoryReport) -> Iterator[str]:
    """The cards, and for each precision yes, no, or only the weights, and how much context."""
    names = [placed.card.name for placed in machine.answers[0].placement.cards]
    what = ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
    yield f"[bold]{'This machine:' if machine is report.here else 'Requested:'}[/bold] {escape(what)}"
    for answer in machine.answers:
        label = "LLM.int8()" if answer.precision == INT8 else "float16"
        yield f"  {label:10}  {_decision(answer, report)}"


def _decision(answer: Answer, report: MemoryReport) -> str:
    asked = tokens_in_words(report.use)
    if not answer.holds_weights:
        return "[red]no[/red], not even the weights"
    if answer.largest_context is None:
        return "[yellow]yes, the weights[/yellow]; the cache size is unknown"
    if answer.fits:
        longer = answer.largest_context > report.use.context
        return f"[green]yes[/green], with {asked}" + (f" and up to {answer.largest_context:,}" if longer else "")
    if answer.largest_context == 0:
        return "[yellow]only the weights[/yellow], with no room for a context"
    return f"[yellow]yes, up to {answer.largest_context:,} tokens[/yellow], not {report.use.context:,}"


def _placement_table(answer: Answer) -> Table:
    table = titled_table("")
    table.add_column("card", no_wrap=True)
    table.add_column("parts", overflow="fold")
    for name in ("weights", "KV", "work", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, placed in enumerate(answer.placement.cards):
        sizes = (placed.weight_bytes, placed.kv_bytes, placed.workspace_bytes, placed.left_bytes)
        table.add_row(f"{number} {escape(placed.card.name)}", escape(units_in_words(placed)), *map(gib, sizes))
    if answer.placement.without:
        first = answer.placement.without[0].name
        more = len(answer.placement.without) - 1
        table.caption = f"no room for {escape(first)}" + (f" and {more} more" if more else "")
    return table


def units_in_words(placed: Placed) -> str:
    """`embeddings, h.0-6`: consecutive blocks as a range."""
    runs: list[tuple[str, int, int] | str] = []
    for load in placed.loads:
        stack, _, index = load.name.rpartition(".")
        if not index.isdigit():
            runs.append(load.name)
            continue
        last = runs[-1] if runs else ""
        if not isinstance(last, str) and last[0] == stack and last[2] == int(index) - 1:
            runs[-1] = (stack, last[1], int(index))
        else:
            runs.append((stack, int(index), int(index)))
    return ", ".join(run if isinstance(run, str) else _range(*run) for run in runs) or "nothing"


def _range(stack: str, first: int, last: int) -> str:
    return f"{stack}.{first}" + (f"-{last}" if last > first else "")
