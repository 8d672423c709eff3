"""Numbers as people read them. Decimal units throughout: 1 GB is 10^9 bytes."""


def human_bytes(count: float) -> str:
    """`352.49 GB` for 352494542848."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_count(count: int) -> str:
    """`135 M`, `176 B`: parameters."""
    value = float(count)
    for unit in ("", " K", " M", " B"):
        if value < 1000:
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} T"


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"
