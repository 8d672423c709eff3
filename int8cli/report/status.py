"""How far a conversion is, on the terminal, and what to do next."""

from int8cli.report.terminal import stdout_console
from int8cli.report.text import escape
from int8cli.results.conversion_status import ConversionStatus, PartStatus
from int8cli.results.units import human_bytes


def show_status(found: ConversionStatus) -> None:
    """Print a line for each thing that is known."""
    console = stdout_console()
    at = f" at {found.revision}" if found.revision else ""
    lines = [
        f"[bold]{escape(found.directory)}[/bold]: {found.state}, from {escape(found.model)}{escape(at)}",
        f"  shards    {found.shards_finished} of {found.shards}, "
        f"{human_bytes(found.source_bytes_finished)} of {human_bytes(found.source_bytes)}",
    ]
    if found.blocks_run:
        lines.append(f"  blocks    {found.blocks_run} run to choose outlier columns")
    if found.partial_bytes:
        lines.append(f"  download  {human_bytes(found.partial_bytes)} here, not converted yet")
    if found.shards_uploaded:
        removed = f"; {found.shards_removed} are not here any more" if found.shards_removed else ""
        commit = "not committed yet" if found.commit is None else f"commit {escape(found.commit[:12])}"
        to = escape(str(found.uploaded_to))
        lines.append(f"  uploaded  {found.shards_uploaded} of {found.shards} to {to}, {commit}{removed}")
    lines += [f"  part      {_part(each)}" for each in found.parts]
    lines.append(f"  next      {_next(found)}")
    for line in lines:
        console.print(line, soft_wrap=True)


def _part(part: PartStatus) -> str:
    where = f"{'was started on' if part.state == 'elsewhere' else part.state + ', on'} {', '.join(part.hosts)}"
    return escape(f"{part.part} of {part.parts}: {part.shards_finished} of {part.shards} shards, {where}")


def _next(found: ConversionStatus) -> str:
    if found.state == "running":
        return "wait: a process is at work on it"
    if found.state == "finished" and found.shards_removed and found.commit is None:
        return "the same int8cli convert command again: the push is not finished"
    if found.state == "finished" and found.shards_removed:
        return f"download {escape(str(found.uploaded_to))}, then int8cli verify the copy"
    if found.state == "finished":
        return f"int8cli verify {escape(found.directory)}"
    if found.parts and found.shards_finished == found.shards:
        return "int8cli convert once more, to finish it: all parts have ended"
    if found.parts:
        return "the parts that stopped, or were not started: they resume"
    return "the same int8cli convert command again: it resumes"
