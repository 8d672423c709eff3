"""The end of one part of a conversion: on the terminal and as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from int8cli.report.terminal import stdout_console
from int8cli.report.text import escape
from int8cli.results.conversion import ConversionReport
from int8cli.results.units import counted, human_bytes, human_seconds

PART_RESULT_SCHEMA = "int8cli.part-result/1"
_SHOWN = 3


def part_to_json(
    part: tuple[int, int], output: Path, report: ConversionReport, missing: Sequence[str], *, to_publish: bool = False
) -> dict[str, Any]:
    """`report` is that of the whole if no shard is `missing`, else that of the part's own shards.

    With `to_publish`, shards are uploaded as well, and a commit is to be made of them when none is missing.
    """
    return {
        "schema": PART_RESULT_SCHEMA,
        "directory": str(output),
        "part": part[0],
        "parts": part[1],
        "finished": not missing,
        "missing": list(missing),
        "to_publish": to_publish,
        "report": report.to_json(),
    }


def show_part_ended(
    part: tuple[int, int],
    output: Path,
    report: ConversionReport,
    missing: Sequence[str],
    seconds: float,
    *,
    conclude: str = "",
) -> None:
    """Print what is converted, and what the other parts have to do.

    `conclude` is how to publish what all parts have uploaded, where that is still to be done.
    """
    console = stdout_console()
    which, where = f"part {part[0]} of {part[1]}", f"[bold]{escape(str(output))}[/bold]"
    if not missing and conclude:
        console.print(f"[green]Done.[/green] All shards are converted and uploaded ({which} was the last).")
        console.print(f"Next, to publish them:\n  {escape(conclude)}", soft_wrap=True)
        return
    if not missing:
        console.print(f"[green]Done.[/green] All shards are converted, and {where} is complete ({which} was the last).")
        console.print(f"Next:\n  int8cli verify {escape(str(output))}", soft_wrap=True)
        return
    sizes = f"{human_bytes(report.source_bytes)} → {human_bytes(report.output_bytes)}"
    shards = counted(report.shards, "shard")
    console.print(
        f"[green]Done.[/green] {which} is in {where}: {shards}, {sizes}, in {human_seconds(seconds)}.", soft_wrap=True
    )
    names = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
    console.print(f"Other parts have to convert {counted(len(missing), 'shard')}: {escape(names)}", soft_wrap=True)
