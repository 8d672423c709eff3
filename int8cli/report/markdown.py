"""Names that come from a checkpoint, made safe for Markdown and for the Python in it.

Owns what of them a model card may hold: a name ends no code span, no table cell and no line, and is neither a link nor
HTML nor code. Harmless names stay as they are. Where one is not, numeric references stand for its punctuation: no
renderer takes them for structure, https://spec.commonmark.org/0.31.2/#entity-and-numeric-character-references.
"""

import keyword
import re
from urllib.parse import quote

from int8cli.report.text import printable

_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
# What begins or ends something within a paragraph, with GitHub's extensions: code, emphasis, links, HTML, references,
# strikethrough, formulas, and addresses that become links by themselves. An underscore within a word does not.
_STRUCTURE = re.compile(r"[\\`*~$<>\[\]]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def text(name: str) -> str:
    """The name within a line of a paragraph or a heading; not at its start, and not in a table."""
    return _STRUCTURE.sub(_reference, printable(name))


def code(name: str) -> str:
    """The name in code, in a paragraph or a table cell."""
    shown = printable(name)
    if shown.strip() == shown != "" and "`" not in shown and "|" not in shown:
        return f"`{shown}`"
    return f"<code>{_PUNCTUATION.sub(_reference, shown)}</code>"


def link(name: str, address: str) -> str:
    """A link with the name as its text. What an address cannot hold is quoted."""
    return f"[{text(name)}]({quote(address, safe=':/')})"


def python_class(name: str, otherwise: str) -> str:
    """The name where Python takes it for that of a class; else `otherwise`."""
    return name if name.isascii() and name.isidentifier() and not keyword.iskeyword(name) else otherwise


def _reference(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"
