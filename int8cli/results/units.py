"""Numbers as people read them. Decimal units throughout: 1 GB is 10^9 bytes."""

import math


def human_bytes(count: float) -> str:
    """Three digits: `352 GB` for 352494542848, `53.1 MB`, `512 B`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    decimals = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{decimals}f} {unit}"


def told_apart(needed_bytes: int, free_bytes: int) -> tuple[str, str]:
    """Both as people read them; in bytes where rounding would make them look equal."""
    needed, free = human_bytes(needed_bytes), human_bytes(free_bytes)
    if needed == free and needed_bytes != free_bytes:
        return f"{needed_bytes:,} bytes", f"{free_bytes:,} bytes"
    return needed, free


def human_count(count: int) -> str:
    """`135 M`, `176 B`: parameters."""
    value = float(count)
    for unit in ("", " K", " M", " B"):
        if value < 1000:
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} T"


def human_seconds(seconds: float) -> str:
    """`14 s`, `25 min`, `3.2 h`."""
    if seconds < 99.5:
        return f"{max(1.0, seconds):.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def percent(share: float) -> str:
    """Two digits, or whole percents from 10: `2.1 %` for 0.0213, `0.56 %`, `12 %`."""
    value = 100 * share
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f} %" if value >= 9.95 else f"{value:.1f} %" if value >= 0.995 else f"{value:.2g} %"


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def perplexity_text(value: float) -> str:
    """`22.85`, `9,876.54`, `8.99e+04`."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.2f}" if value < 10_000 else f"{value:.3g}"


def counted(count: int, what: str) -> str:
    """`1 layer`, `210 layers`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
