"""Tables of the results in Markdown: medians over the turns, and medians of the ratios in each turn."""

from collections.abc import Iterable, Sequence

from benchmarking.cases import (
    COLD_CONVERT,
    COLD_COPY,
    CONVERT,
    COPY,
    IMPORT_TORCH,
    INSPECT,
    NO_FIGURES,
    READ_OUTPUT,
    READ_SOURCE,
    STORE_COLUMNS,
    VERIFY,
    Section,
)
from benchmarking.turns import median, median_ratio

NOISE_S = 0.2  # how much the start time alone varies from run to run
# The command that each is compared with, and its name in the table.
COMPARED_WITH = {
    CONVERT: (COPY, "cp"),
    NO_FIGURES: (COPY, "cp"),
    STORE_COLUMNS: (COPY, "cp"),
    COLD_CONVERT: (COLD_COPY, "cp"),
    INSPECT: (READ_SOURCE, "cat"),
    VERIFY: (READ_OUTPUT, "cat"),
}


def against_copy(section: Section) -> str:
    """Each command, and how it compares with cp or cat."""
    header = (
        "",
        "seconds",
        "less start-up",
        "ratio",
        "less start-up",
        "CPU seconds",
        "less start-up",
        "peak over torch",
    )
    rows = []
    for name, runs in section.runs.items():
        if name == IMPORT_TORCH:
            continue
        row = [f"`{name}`", f"{median(runs, 'seconds'):.2f}", "", "", "", f"{median(runs, 'cpu_s'):.2f}", "", ""]
        if name in COMPARED_WITH and COMPARED_WITH[name][0] in section.runs:
            other, word = COMPARED_WITH[name]
            against = section.runs[other]
            row[2] = f"{median(runs, 'apart_s'):.2f}"
            row[3] = f"{median_ratio(runs, against, 'seconds', 'seconds'):.2f} × {word}"
            row[4] = f"{median_ratio(runs, against, 'apart_s', 'seconds'):.2f} × {word}"
            row[6] = f"{median(runs, 'apart_cpu_s'):.2f}"
            row[7] = over_torch(section, name)
        rows.append(row)
    (source_bytes,) = section.source_bytes.values()
    return f"BLOOM's blocks, {turns_and_size(section, source_bytes)}\n\n{_table(header, rows)}{_left_out(section)}"


def peers(section: Section) -> str:
    """Each converter, and its time relative to int8cli, with and without error figures."""
    times = ("times ours", "without figures")
    header = ("", "seconds", "less start-up", *times, "CPU seconds", "less start-up", "peak memory", "output")
    ours = [section.runs[name] for name in (CONVERT, NO_FIGURES)]
    rows = []
    for name, runs in section.runs.items():
        if name == IMPORT_TORCH:
            continue
        apart = name != COPY
        rows.append(
            [
                f"`{name}`" if name in (COPY, CONVERT, NO_FIGURES) else name,
                f"{median(runs, 'seconds'):.2f}",
                f"{median(runs, 'apart_s'):.2f}" if apart else "",
                *(f"{median_ratio(runs, own, 'apart_s', 'apart_s'):.1f}" if apart else "" for own in ours),
                f"{median(runs, 'cpu_s'):.2f}",
                f"{median(runs, 'apart_cpu_s'):.2f}" if apart else "",
                _megabytes(max(run.peak_bytes for run in runs)) if apart else "",
                f"{median(runs, 'output_bytes') / 1e9:.2f} GB",
            ]
        )
    (source_bytes,) = section.source_bytes.values()
    known = "".join(f"\n{name}: {versions}." for name, versions in section.versions.items())
    base = median(section.runs[IMPORT_TORCH], "peak_bytes")
    return (
        f"Blocks of Llama-2-7B, {turns_and_size(section, source_bytes)}\n\n{_table(header, rows)}{_left_out(section)}"
        f"\n`{CONVERT}` measures the error of every layer, `--no-figures` leaves that out as the other converters do."
        f"\nPeak memory is all that is resident, mapped files included; importing torch alone takes {_megabytes(base)}."
        f"\n{known}\n"
    )


def growth(section: Section) -> str:
    """Time and memory by size."""
    header = (
        "source",
        "seconds",
        "less start-up",
        "GB/s, less start-up",
        "CPU seconds",
        "less start-up",
        "peak over torch",
    )
    rows = []
    for name, source_bytes in section.source_bytes.items():
        if name in section.runs:
            runs = section.runs[name]
            apart_s = median(runs, "apart_s")
            cells = (f"{source_bytes / 1e9:.2f} GB", f"{median(runs, 'seconds'):.2f}", f"{apart_s:.2f}")
            rate = f"{source_bytes / apart_s / 1e9:.2f}" if apart_s > NOISE_S else ""
            cpu = (f"{median(runs, 'cpu_s'):.2f}", f"{median(runs, 'apart_cpu_s'):.2f}")
            rows.append([*cells, rate, *cpu, over_torch(section, name)])
    return f"How cost grows, {_turns(section)}\n\n{_table(header, rows)}{_left_out(section)}"


def over_torch(section: Section, name: str) -> str:
    """The largest peak of a case's runs, minus that of Python with torch imported."""
    peak = max(run.peak_bytes for run in section.runs[name])
    return _megabytes(peak - median(section.runs[IMPORT_TORCH], "peak_bytes"))


def turns_and_size(section: Section, source_bytes: int) -> str:
    return f"{source_bytes / 1e9:.2f} GB, {_turns(section)}"


def _turns(section: Section) -> str:
    return f"medians of {len(section.runs[IMPORT_TORCH])} runs in turn"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(header) - 1))
    return "\n".join(lines) + "\n"


def _left_out(section: Section) -> str:
    return "".join(f"\nLeft out: {name}: {reason}.\n" for name, reason in section.left_out.items())
