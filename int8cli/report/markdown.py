"""Makes names from a checkpoint safe for Markdown, and for the Python code in it.

Owns what a name may do in a model card: it cannot end a code span, a table cell or a line, and cannot become a link,
HTML or code. Harmless names are not changed. In other names, punctuation becomes numeric references, which no renderer
interprets as structure: https://spec.commonmark.org/0.31.2/#entity-and-numeric-character-references.
"""

import keyword
import re
from urllib.parse import quote

from int8cli.report.text import printable

_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
# Everything that has a meaning inside a paragraph, with GitHub's extensions: code, emphasis, links, HTML, references,
# strikethrough, formulas, and addresses that become links automatically. An underscore inside a word has none.
_STRUCTURE = re.compile(r"[\\`*~$<>\[\]]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def text(name: str) -> str:
    """The name for a paragraph or a heading. Not for the start of a line, and not for a table."""
    return _STRUCTURE.sub(_reference, printable(name))


def code(name: str) -> str:
    """The name as code, for a paragraph or a table cell."""
    shown = printable(name)
    if shown.strip() == shown != "" and "`" not in shown and "|" not in shown:
        return f"`{shown}`"
    return f"<code>{_PUNCTUATION.sub(_reference, shown)}</code>"


def link(name: str, address: str) -> str:
    """A link with the name as its text. Characters that are not allowed in an address are quoted."""
    return f"[{text(name)}]({quote(address, safe=':/')})"


def python_class(name: str, otherwise: str) -> str:
    """The name, if it is a valid name for a Python class; otherwise `otherwise`."""
    return name if name.isascii() and name.isidentifier() and not keyword.iskeyword(name) else otherwise


def _reference(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"
