"""Which linear layers a model's own code does not only call: it reads their weight, which in int8 is another thing."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

_SETTING_UP = re.compile(r"init|reset_parameters|tie_weights|set_output_embeddings")
# Conditions under which code does not run in an int8 model in use, and reads that int8 does not disturb.
_NOT_IN_INT8 = re.compile(
    r"self\.training|slow_but_exact|_is_quantized|is_floating_point|torch\.int8|weight\.dtype == torch\.float32"
)
_READ = re.compile(r"self\.(\w+)(?:\[\w+\])?\.weight\b(?!\.(?:device|shape))")


def linears_read(model: Any, linears: list[str]) -> list[str]:
    """The names of the linear layers whose weight is read by the class of the module that they are in."""
    modules = dict(model.named_modules())
    found = []
    for name in linears:
        parent, _, attribute = name.rpartition(".")
        if attribute.isdigit():  # in a list, which belongs to the module above
            parent, _, attribute = parent.rpartition(".")
        if attribute in _attributes_read(modules[parent].__class__):
            found.append(name)
    return found


@cache
def _attributes_read(module_class: type) -> frozenset[str]:
    """The attributes of which a class reads `.weight` in what is not its set-up."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(module_class)))
    except (OSError, TypeError, SyntaxError):  # made by other code
        return frozenset()
    methods = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return frozenset(
        name for method in methods if not _SETTING_UP.search(method.name) for name in _reads_in(method.body)
    )


def _reads_in(statements: list[ast.stmt]) -> Iterator[str]:
    """Of `self.proj.weight` and `self.proj[0].weight`, "proj"."""
    for statement in statements:
        if isinstance(statement, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            condition = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
            if not _NOT_IN_INT8.search(condition):
                yield from _READ.findall(condition)
                yield from _reads_in(statement.body)
            if "_is_quantized" not in condition:
                yield from _reads_in(getattr(statement, "orelse", []))
        else:
            yield from _READ.findall(ast.unparse(statement))
