"""Reduces an SVG by Vega to a fifth of its size, with the same picture.

Pages give it an alternative text, so it needs no labels for screen readers on thousands of marks. Coordinates need one
decimal. A mark that is drawn many times is defined once.
"""

import re
from collections import Counter

LABELS = re.compile(r' (?:aria-\w+|role)="[^"]*"')
COORDINATES = re.compile(r' (?:d|transform)="[^"]*"')
LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}(?:e-\d+)?")
MARK = re.compile(r'<path transform="(?P<place>translate\([^)]*\))"(?P<look> d="[^"]*"[^>]*)/>')
LEAST_TIMES = 5


def slimmed(svg: str) -> str:
    svg = COORDINATES.sub(lambda match: LONG_NUMBER.sub(_rounded, match[0]), LABELS.sub("", svg))
    looks = Counter(match["look"] for match in MARK.finditer(svg))
    names = {look: f"m{number}" for number, (look, times) in enumerate(looks.items()) if times >= LEAST_TIMES}

    def shared(match: re.Match[str]) -> str:
        name = names.get(match["look"])
        return f'<use href="#{name}" transform="{match["place"]}"/>' if name else match[0]

    shapes = "".join(f'<path id="{name}"{look}/>' for look, name in names.items())
    return re.sub(r"(<svg[^>]*>)", rf"\1<defs>{shapes}</defs>", MARK.sub(shared, svg), count=1)


def _rounded(match: re.Match[str]) -> str:
    text = f"{float(match[0]):.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
