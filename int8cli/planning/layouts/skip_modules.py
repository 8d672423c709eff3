"""`llm_int8_skip_modules`: telling transformers which linear layers a plan left alone.

Owns the one list in config.json that makes the loader build plain layers where the file holds plain weights. Given such
a list, the loader drops its own default (output head, tied weights), so the head is always named here.
"""

import re
from collections.abc import Collection, Iterator

from int8cli.planning import architectures as names
from int8cli.planning.plan import Decision, Plan

EXPERTS_PATTERN = r".*\.experts"

# Tensors with these reasons are no module that the loader would replace, whatever the list says.
_NEVER_REPLACED = frozenset(
    {names.NOT_FLOAT, names.NORM_OR_BIAS, names.NOT_A_MATRIX, names.NOT_A_WEIGHT, names.EMBEDDING, names.SUBCLASS}
)
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def skip_modules(plan: Plan, also_replaced: Collection[str] = ()) -> list[str]:
    """The entries that make transformers leave alone every linear layer that the plan leaves alone, and no other.

    `also_replaced` are reasons of the plan for modules which this loader would replace though bitsandbytes' does not.

    An entry covers a module when it is a suffix of its name, or matches it as a regular expression from its start up
    to a dot or its end (transformers, quantizers_utils.py, `should_convert_module`). Entries are suffixes wherever a
    suffix tells the module from all quantized ones: those hold with and without the base model's prefix. Sorted.

    The loader matches its own names. Where transformers renames more than prefixes on load, an entry made from the
    file's name may miss; for what is left alone by default the tables of `architectures` give the loader's names.
    """
    quantized = _with_and_without_prefix(decision.module for decision in plan.quantized)
    entries: list[str] = []
    for wanted in _always_named(plan):
        if not _covers_any(wanted, quantized):
            entries.append(wanted)
    for decision in plan.copied:
        if _may_be_replaced(decision, also_replaced) and not any(covers(entry, decision.module) for entry in entries):
            entries.append(_entry_for(decision.module, quantized))
    return sorted(set(entries))


def covers(entry: str, module: str) -> bool:
    """Whether transformers leaves `module` alone because of `entry`; the rule of its `should_convert_module`."""
    return module.endswith(entry) or re.match(rf"(?:{entry}){_BOUNDARY}", module) is not None


def _always_named(plan: Plan) -> Iterator[str]:
    """What the checkpoint may not hold under that name, tied heads above all, and experts, often many thousands."""
    yield "lm_head"
    yield from plan.absent
    if any(decision.reason == names.EXPERT for decision in plan.copied):
        yield EXPERTS_PATTERN


def _may_be_replaced(decision: Decision, also_replaced: Collection[str]) -> bool:
    return decision.reason not in _NEVER_REPLACED or decision.reason in also_replaced


def _entry_for(module: str, quantized: Collection[str]) -> str:
    """The shortest entry that covers a module and no quantized one."""
    return next((entry for entry in _candidates(module) if not _covers_any(entry, quantized)), f"^{re.escape(module)}$")


def _candidates(module: str) -> Iterator[str]:
    """Entries that cover a module: suffixes of its name, then its whole name with any one prefix or none."""
    parts = module.split(".")
    if re.fullmatch(r"[\w.]+", module):  # else it would not be read as a pattern for itself
        yield from (".".join(parts[start:]) for start in reversed(range(len(parts))) if not parts[start].isdigit())
    if len(parts) > 1 and re.fullmatch(r"\w+", parts[0]):
        yield rf"^(?:\w+\.)?{re.escape('.'.join(parts[1:]))}$"
    yield rf"^(?:\w+\.)?{re.escape(module)}$"


def _covers_any(entry: str, modules: Collection[str]) -> bool:
    return any(covers(entry, module) for module in modules)


def _with_and_without_prefix(modules: Iterator[str]) -> frozenset[str]:
    """The names themselves, and what they become when the loader takes a base model's prefix off."""
    found: set[str] = set()
    for module in modules:
        found.update((module, module.partition(".")[2] or module))
    return frozenset(found)
