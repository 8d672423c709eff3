"""The ways to convert a model, with time, memory and disk: for the dry run, the estimate, and a question."""

from collections.abc import Sequence

from rich.table import Table

from int8cli.estimate.machines import OnMachines
from int8cli.estimate.ways import Way
from int8cli.records.conversion import FROM_ACTIVATIONS, NO_OUTLIERS
from int8cli.report.terminal import titled_table
from int8cli.results.units import human_bytes, human_seconds


def ways_table(ways: Sequence[Way], title: str, download_bytes: int = 0) -> Table:
    """A row for each way; the first is what happens without another option."""
    table = titled_table(title)
    table.add_column("way to choose columns", no_wrap=True)
    for name in ("time", "memory", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outliers", no_wrap=True)
    for way in ways:
        table.add_row(what(way), time_of(way), human_bytes(way.memory_bytes), human_bytes(way.disk_bytes), way.outliers)
    table.caption = "time: speed of this machine times the work" if any(way.seconds for way in ways) else None
    if table.caption and download_bytes:
        table.caption = f"{table.caption}; add the download of {human_bytes(download_bytes)}"
    return table


def machines_table(rows: Sequence[OnMachines]) -> Table:
    """A row for each number of machines, with the figures of the machine that has most to do."""
    table = titled_table("On machines like this one, a part each")
    for name in ("machines", "shards", "reads", "writes", "transfer", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        transfer = "not asked" if row.transfer_s is None else human_seconds(row.transfer_s)
        time = "unknown" if row.seconds is None else f"about {human_seconds(row.seconds)}"
        sizes = human_bytes(row.source_bytes), human_bytes(row.output_bytes)
        table.add_row(f"{row.machines:,}", f"{row.shards:,}", *sizes, transfer, time)
    table.caption = "of the largest part; without running the model"
    return table


def what(way: Way) -> str:
    """What a way does, in words."""
    if way.outliers == FROM_ACTIVATIONS:
        return f"run the model on {way.tokens:,} tokens"
    return "none stored" if way.outliers == NO_OUTLIERS else f"from the {way.outliers} alone"


def time_of(way: Way) -> str:
    return "unknown" if way.seconds is None else f"about {human_seconds(way.seconds)}"
