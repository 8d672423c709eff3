"""The report of a finished conversion: read from its directory, and written as a page or a picture."""

from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.errors import OutputError
from int8cli.planning.output_files import REPORT_FILE
from int8cli.records.report_file import read_report_file
from int8cli.report.conversion_page import write_conversion
from int8cli.results.conversion import ConversionReport


@system_errors()
def read_report(directory: str | Path) -> ConversionReport:
    """The report of the conversion in `directory`. Raises OutputError for a directory without one."""
    report = read_report_file(Path(directory) / REPORT_FILE)
    if report is None:
        raise OutputError(
            f"{directory} is not a finished conversion: it has no {REPORT_FILE}",
            hint="`int8cli status` tells how far a conversion is. The same `int8cli convert` command finishes it.",
        )
    return report


@system_errors()
def write_report(report: ConversionReport, path: str | Path) -> None:
    """Write a report as one page (.html) or as a picture of its charts (.png, .svg), whole or not at all.

    Raises OutputError, and MissingExtraError if int8cli[plots] is not installed.
    """
    write_conversion(report, Path(path))
