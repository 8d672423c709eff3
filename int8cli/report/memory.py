"""A memory estimate on the terminal.

Owns how the estimate is shown. GB is 10^9 bytes, the unit of disks and downloads; GiB is 2^30, the unit of cards.
"""

from collections.abc import Iterator

from rich.table import Table

from int8cli.estimate.answers import MemoryReport
from int8cli.estimate.estimate import INT8, PRECISIONS, WORKSPACE_FORMULA, Estimate, Part, Use
from int8cli.estimate.units import HEAD
from int8cli.estimate.weights import Weights
from int8cli.report.memory_cards import LABELS, gib, show_cards, tokens_in_words
from int8cli.report.terminal import stdout_console, titled_table
from int8cli.report.text import escape
from int8cli.report.ways import machines_table, ways_table
from int8cli.results.units import human_bytes, human_count

_BAR_WIDTH = 30


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
    for share in estimate.layouts:
        console.print(
            f"  in the {share.layout} layout: {share.percent_int8:.1f} % int8, {share.percent_float_experts:.1f} % "
            f"experts in floats, {human_bytes(share.output_bytes)}",
            soft_wrap=True,
        )
    console.print()
    console.print_table(_precision_table(estimate))
    console.print()
    console.print_table(_parts_table(estimate))
    if not any(part.name == HEAD and part.weights.float16_bytes for part in estimate.parts):
        console.print("[dim]The output head shares the embedding's weight, or the model has none.[/dim]")
    console.print()
    for line in (*_use_lines(report), "", *_conversion_lines(estimate)):
        console.print(line, soft_wrap=True)
    console.print_table(ways_table(report.ways, "", estimate.conversion.download_bytes))
    if report.on_machines:
        console.print_table(machines_table(report.on_machines))
    show_cards(console, report)


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
    yield f"[bold]In use[/bold], {tokens_in_words(use)} in one forward pass"
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
        totals = " · ".join(f"{LABELS[name]} {gib(total_bytes(report, name) or 0)}" for name in PRECISIONS)
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
    if needs.download_bytes:
        yield f"  disk       {human_bytes(needs.disk_keeping_source_bytes):>9}  if the source is kept, else as below"


def _element_bytes(use: Use) -> int:
    from int8cli.estimate.kv_cache import DTYPE_BYTES

    return DTYPE_BYTES[use.kv_dtype]
