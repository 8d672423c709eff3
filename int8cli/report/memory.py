"""A memory estimate on the terminal, in 80 columns.

Owns how the estimate is shown. GB is 10^9 bytes, the unit of disks and downloads; GiB is 2^30, the unit of cards.
"""

from collections.abc import Iterator, Sequence

from rich.table import Table

from int8cli.estimate.answers import MemoryReport
from int8cli.estimate.cards import GIB, USABLE_RULE, Placed
from int8cli.estimate.estimate import FLOAT16, INT8, PRECISIONS, WORKSPACE_FORMULA, Estimate, Part, Use
from int8cli.estimate.fit import Answer, Count, FitRow
from int8cli.estimate.units import HEAD
from int8cli.estimate.weights import Weights
from int8cli.report.terminal import stdout_console, titled_table
from int8cli.report.text import escape
from int8cli.results.units import human_bytes, human_count

_BAR_WIDTH = 30
_NOT_KNOWN = "?"
_LABELS = {FLOAT16: "float16", INT8: "int8"}


def show_memory(report: MemoryReport) -> None:
    """Print weights by precision and part, what use adds, what a conversion needs, and the cards the model fits on."""
    console = stdout_console()
    estimate = report.estimate
    files = len(estimate.survey.shards)
    console.print(
        f"[bold]{escape(estimate.survey.identity.name)}[/bold]: {human_count(estimate.weights.parameters)} parameters "
        f"in {files} file{'s' if files > 1 else ''}, {escape(' and '.join(estimate.stored_dtypes))}",
        soft_wrap=True,
    )
    console.print(f"{estimate.survey.plan.percent_quantized:.1f} % become int8; a dry run of convert lists the rest")
    console.print()
    console.print(_precision_table(estimate))
    console.print()
    console.print(_parts_table(estimate))
    if not any(part.name == HEAD and part.weights.float16_bytes for part in estimate.parts):
        console.print("[dim]The output head shares the embedding's weight, or the model has none.[/dim]")
    console.print()
    for line in (*_use_lines(report), "", *_conversion_lines(estimate)):
        console.print(line, soft_wrap=True)
    for title, answers in (("This machine:", report.machine), ("Requested:", report.answers)):
        if answers:
            console.print()
            for line in _verdicts(answers, report, title):
                console.print(line, soft_wrap=True)
            console.print(_placement_table(answers[-1]))
    if not report.answers:
        console.print()
        console.print(_fit_table(report))
        console.print(f"[dim]in use: with {_tokens(report.use)} · -: too small for one layer[/dim]")
        if len(list(_rows_that_differ(report.table))) < len(report.table):
            console.print("[dim]One larger card is enough.[/dim]")
    console.print(f"[dim]{USABLE_RULE}[/dim]")


def gib(count: float) -> str:
    """`7.66 GiB`; below a tenth of one, MiB."""
    if not count:
        return "0"
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        value = count / size
        if abs(value) >= 0.0995 or unit == "KiB":
            return f"{value:,.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f} {unit}"
    raise AssertionError


def _precision_table(estimate: Estimate) -> Table:
    table = titled_table("Weights")
    for name in ("", "decimal", "binary", "largest block"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    weights, buffers = estimate.weights, estimate.buffer_bytes
    block = estimate.largest_block[1] if estimate.largest_block else Weights()
    rows = (
        ("as stored", estimate.survey.source_bytes, block.stored_bytes),
        ("float32", weights.float32_bytes + buffers, block.float32_bytes),
        ("float16, bfloat16", weights.float16_bytes + buffers, block.float16_bytes),
        ("LLM.int8()", weights.int8_bytes + buffers, block.int8_bytes),
    )
    for name, size, largest in rows:
        style = "bold" if name == "LLM.int8()" else ""
        table.add_row(name, human_bytes(size), gib(size), gib(largest) if largest else "-", style=style)
    for name, size in (
        ("  int8 data", weights.int8_data_bytes),
        ("  scales, float32", weights.int8_scale_bytes),
        ("  left as stored", weights.int8_rest_bytes),
    ):
        table.add_row(name, human_bytes(size), gib(size), "", style="dim")
    written = estimate.conversion.output_bytes
    table.add_row("LLM.int8() on disk", human_bytes(written), gib(written), f"{written:,} bytes")
    return table


def _parts_table(estimate: Estimate) -> Table:
    table = titled_table("By part: █ in int8, ░ extra in 16 bit")
    for name in ("", "", "16 bit", "int8"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    most = max((part.weights.float16_bytes for part in estimate.parts), default=0)
    for part in estimate.parts:
        table.add_row(
            escape(part.name),
            _bar(part, most),
            human_bytes(part.weights.float16_bytes),
            human_bytes(part.weights.int8_bytes),
        )
    return table


def _bar(part: Part, most: int) -> str:
    """Two tones: the LLM.int8() size, and the extra size in 16 bit."""
    if not most:
        return ""
    full = max(1, round(_BAR_WIDTH * part.weights.float16_bytes / most)) if part.weights.float16_bytes else 0
    solid = min(full, round(_BAR_WIDTH * part.weights.int8_bytes / most))
    solid = max(solid, 1) if full else 0
    return "█" * solid + "░" * (full - solid)


def _use_lines(report: MemoryReport) -> Iterator[str]:
    estimate, use = report.estimate, report.use
    sequences = f"{use.batch} x {use.context:,} tokens" if use.batch > 1 else f"{use.context:,} tokens"
    yield f"[bold]In use[/bold], {sequences} in one forward pass"
    kv_bytes = estimate.kv_bytes(use)
    workspace = estimate.workspace_bytes(use, INT8)
    if kv_bytes is None:
        yield f"  KV cache   [yellow]unknown[/yellow]: {escape(estimate.cache.reason)}"
    elif not estimate.cache.layers:
        yield f"  KV cache   none: {escape(estimate.cache.reason)}"
    else:
        a_token = estimate.cache.bytes_a_token(_element_bytes(use)) or 0
        yield f"  KV cache   {gib(kv_bytes):>9}  {use.kv_dtype}, {a_token:,} bytes per token"
        yield f"             {'':>9}  {escape(estimate.cache.reason)}"
    if workspace:
        yield f"  workspace  {gib(workspace):>9}  for the int8 product, estimated for the largest layer:"
        yield f"  [dim]{WORKSPACE_FORMULA}[/dim]"
    if kv_bytes is not None:
        totals = " · ".join(f"{_LABELS[name]} {gib(total_bytes(report, name) or 0)}" for name in PRECISIONS)
        yield f"  [bold]total[/bold]      {totals}"


def total_bytes(report: MemoryReport, precision: str) -> int | None:
    """Weights, cache and workspace on one card of sufficient size; None if the cache size is unknown."""
    estimate, use = report.estimate, report.use
    kv_bytes = estimate.kv_bytes(use)
    weights = estimate.weights.int8_bytes if precision == INT8 else estimate.weights.float16_bytes
    if kv_bytes is None:
        return None
    return weights + estimate.buffer_bytes + kv_bytes + estimate.workspace_bytes(use, precision)


def _conversion_lines(estimate: Estimate) -> Iterator[str]:
    needs = estimate.conversion
    yield "[bold]To convert[/bold]"
    yield f"  download   {human_bytes(needs.download_bytes):>9}"
    yield f"  disk       {human_bytes(needs.disk_bytes):>9}  at the peak: output and shards in flight"
    if needs.download_bytes:
        yield f"             {human_bytes(needs.disk_keeping_source_bytes):>9}  if source shards are kept"
    yield f"  memory     {human_bytes(needs.buffer_bytes):>9}  for buffers, besides Python with torch (0.2-0.3 GB)"


def _fit_table(report: MemoryReport) -> Table:
    table = titled_table("Cards needed (whole layers per card)")
    table.add_column("", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for precision in PRECISIONS:
        table.add_column(f"{_LABELS[precision]}\nweights", justify="right", no_wrap=True)
        table.add_column("\nin use", justify="right", no_wrap=True)
    known = report.estimate.cache.layers is not None
    for row in _rows_that_differ(report.table):
        cells = [cell for name in PRECISIONS for cell in _count_cells(row.counts[name], known=known)]
        best = row.counts[INT8].in_use if known else row.counts[INT8].weights
        table.add_row(escape(row.card.name), gib(row.card.total_bytes), *cells, style="green" if best == 1 else "")
    return table


def _rows_that_differ(table: tuple[FitRow, ...]) -> Iterator[FitRow]:
    """The rows up to the first card that is large enough on its own, because all larger cards are too."""
    for row in table:
        yield row
        if all(count.weights == count.in_use == 1 for count in row.counts.values()):
            return


def _count_cells(count: Count, *, known: bool) -> tuple[str, str]:
    weights = "-" if count.weights is None else str(count.weights)
    in_use = _NOT_KNOWN if not known else "-" if count.in_use is None else str(count.in_use)
    return weights, in_use


def _tokens(use: Use) -> str:
    return f"{use.batch} x {use.context:,} tokens" if use.batch > 1 else f"{use.context:,} tokens"


def _verdicts(answers: tuple[Answer, ...], report: MemoryReport, title: str) -> Iterator[str]:
    """The cards, and for each precision whether the model fits, and with how much context."""
    names = [placed.card.name for placed in answers[0].placement.cards]
    what = ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
    yield f"[bold]{escape(title)}[/bold] {escape(what)}"
    for answer in answers:
        label = "LLM.int8()" if answer.precision == INT8 else "float16"
        yield f"  {label:10}  {_decision(answer, report)}"


def _decision(answer: Answer, report: MemoryReport) -> str:
    asked = _tokens(report.use)
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


def _element_bytes(use: Use) -> int:
    from int8cli.estimate.kv_cache import DTYPE_BYTES

    return DTYPE_BYTES[use.kv_dtype]


__all__: Sequence[str] = ("gib", "show_memory", "total_bytes", "units_in_words")
