"""The result of verify on the terminal: a line for each check, then every failure."""

from rich.table import Table

from int8cli.report.terminal import stdout_console
from int8cli.report.text import escape
from int8cli.results.units import counted
from int8cli.results.verification import Check, Failure, Verification

FAILURES_SHOWN = 20
_MARKS = {
    "passed": "[green]passed[/green]",
    "failed": "[red]FAILED[/red]",
    "not checked": "[yellow]not checked[/yellow]",
}


def show_verification(verification: Verification) -> None:
    """Print the checks and their failures, at most `FAILURES_SHOWN` for each check."""
    console = stdout_console()
    made = f"made from {escape(verification.model)}, layout {escape(verification.layout)}"
    compared = f"; compared with [bold]{escape(verification.source)}[/bold]" if verification.source else ""
    console.print(f"[bold]{escape(verification.directory)}[/bold]: {made}{compared}", soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in verification.checks:
        table.add_row(check.name, _MARKS[check.status], escape(_detail(check)))
    console.print_table(table)
    for check in verification.checks:
        for line in _failure_lines(check):
            console.print(line, soft_wrap=True)
    console.print(_verdict(verification), soft_wrap=True)


def _detail(check: Check) -> str:
    """What was checked, or how much of it failed: the words for success are not those for a failure."""
    return counted(len(check.failures), "failure") + ", listed below" if check.status == "failed" else check.detail


def _failure_lines(check: Check) -> list[str]:
    lines = [f"[red]{check.name}[/red]: {escape(_as_text(failure))}" for failure in check.failures[:FAILURES_SHOWN]]
    if len(check.failures) > FAILURES_SHOWN:
        more = len(check.failures) - FAILURES_SHOWN
        lines.append(f"[red]{check.name}[/red]: … {more:,} more (the JSON output has all)")
    return lines


def _as_text(failure: Failure) -> str:
    where = f"{failure.file}: {failure.tensor}" if failure.tensor else failure.file
    return f"{where}: {failure.problem}" if failure.tensor else f"{where} {failure.problem}"


def _verdict(verification: Verification) -> str:
    failed = [check.name for check in verification.checks if check.status == "failed"]
    if failed:
        return f"[bold red]FAILED: {', '.join(failed)}.[/bold red]"
    unchecked = [check.name for check in verification.checks if check.status == "not checked"]
    if unchecked:
        return f"[bold green]No check failed.[/bold green] Not checked: {', '.join(unchecked)}."
    return "[bold green]All checks passed.[/bold green]"
