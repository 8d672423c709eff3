"""The modules of a sentence-transformers model that have directories of their own, beside the weights.

Owns how `modules.json` and `router_config.json` name them. Opens no weight file.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from int8cli.checkpoint.index import read_small_json
from int8cli.checkpoint.source import Source
from int8cli.errors import IndexFileError


def module_directories(source: Source, files: Sequence[str]) -> frozenset[str]:
    """The directories of all modules except the transformers model itself.

    `modules.json` has the path of each module, `router_config.json` the routes of a Router. If one of them is not JSON,
    it names none, and is copied like any file that int8cli does not read.
    """
    found = set[str]()
    for name, read in (("modules.json", _module_paths), ("router_config.json", _routes)):
        if name in files:
            with suppress(IndexFileError):
                found.update(read(read_small_json(source, name)))
    return frozenset(found - {""})


def _module_paths(modules: Any) -> Iterator[str]:
    for module in modules if isinstance(modules, list) else ():
        if isinstance(module, dict) and not str(module.get("type")).endswith("Transformer"):
            yield str(module.get("path") or "")


def _routes(router: Any) -> Iterator[str]:
    types = router.get("types") if isinstance(router, dict) else None
    for path, kind in types.items() if isinstance(types, dict) else ():
        if not (str(kind).endswith("Transformer") or path.endswith("Transformer")):
            yield path
