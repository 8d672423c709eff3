"""`llm_int8_skip_modules`: the list in config.json that tells transformers which linear layers a plan left alone.

For a module on the list, the loader builds a plain layer. If there is a list, the loader drops its own default (output
head, tied weights), so the list always names the heads: the model's own, and those that another class of the same
family creates.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from int8cli.loaders.older_names import OlderNames
from int8cli.loaders.transformers_versions import SKIP_RULES, SkipRule, covers_by_component, covers_by_name
from int8cli.planning import absent_modules
from int8cli.planning import reasons as why
from int8cli.planning.decisions import Decision, Plan

EXPERTS_PATTERN = r".*\.experts"
ALL_RULES = tuple(dict.fromkeys(reversed(SKIP_RULES.values())))  # the newest first: its entries work most widely

# A version that compares whole names would need one entry for each of these; it quantizes them on load instead.
_NOT_BY_NAME = frozenset({why.ROUTER, why.EXPERT})


def skip_modules(plan: Plan, rules: Sequence[SkipRule] = ALL_RULES) -> list[str]:
    """The entries that make transformers leave alone exactly the linear layers that the plan leaves alone, sorted.

    `rules` say which modules an entry covers; they differ between versions. No entry covers a quantized module by any
    rule. Every layer that the plan leaves alone is covered by each rule, if such an entry exists. An entry is a suffix
    if one distinguishes the module from all quantized ones: a suffix works with and without the base model's prefix.

    The loader matches its own names. Where transformers renames more than whole parts of a model on load, an entry made
    from the file's name may miss; for what is left alone by default the tables of `architectures` give the loader's.
    """
    older_names = OlderNames(decision.module for decision in plan.decisions)
    quantized = _with_and_without_prefix(
        name for decision in plan.quantized for name in (decision.module, *older_names.on_load(decision.module))
    )
    entries = [safe for entry in _always_named(plan) for safe in _safe_form(entry, quantized, rules)]
    for decision in plan.copied:
        if _may_be_linear(decision):
            for name in (decision.module, *older_names.on_load(decision.module)):
                entries += _missing_entries(name, decision.reason, entries, quantized, rules)
    return sorted(set(entries))


def _may_be_linear(decision: Decision) -> bool:
    """Whether the loader might build a linear layer for a tensor, by what it is and not by why it is left alone."""
    spec = decision.spec
    return len(spec.shape) == 2 and spec.name.endswith(".weight") and decision.reason != why.EMBEDDING


def covers(entry: str, module: str) -> bool:
    """Whether current transformers leaves `module` alone because of `entry` (its `should_convert_module`)."""
    return covers_by_component(entry, module)


def _always_named(plan: Plan) -> Iterator[str]:
    """Entries for layers that the checkpoint may not name: tied heads, heads of other tasks, and fused experts."""
    yield "lm_head"
    for entry in plan.absent:
        yield entry
        if re.fullmatch(r"\^\w+\$", entry):
            yield entry[1:-1]  # for the version that does not support expressions
    present = {part for decision in plan.decisions for part in decision.module.split(".")}
    yield from (head for head in absent_modules.TASK_HEADS if head not in present)
    if any(decision.reason == why.EXPERT for decision in plan.copied):
        yield EXPERTS_PATTERN
    yield from (rf"(?:.*\.)?{re.escape(part)}\..*$" for part in sorted(set(_parts_beside_text(plan))))


def _parts_beside_text(plan: Plan) -> Iterator[str]:
    """The names of the largest parts of a model, such as `vision_tower`, that lie beside its language model."""
    language = {
        ".".join(parts[:length])
        for decision in plan.quantized
        for parts in (decision.module.split("."),)
        for length in range(1, len(parts) + 1)
    }
    for decision in plan.copied:
        if decision.reason == why.BESIDE_TEXT:
            parts = decision.module.split(".")
            depth = next((n for n in range(1, len(parts)) if ".".join(parts[:n]) not in language), 0)
            if depth:
                yield parts[depth - 1]  # loaders rename what is before


def _safe_form(entry: str, quantized: Collection[str], rules: Sequence[SkipRule]) -> list[str]:
    """The entry; or, if it covers a quantized module, an expression that matches from the name's start; or nothing."""
    forms = (entry, rf"^(?:{entry})(?:\.|$)")
    return next(([form] for form in forms if not _covers_any(form, quantized, rules)), [])


def _missing_entries(
    module: str, reason: str, entries: Iterable[str], quantized: Collection[str], rules: Sequence[SkipRule]
) -> list[str]:
    """What to add to `entries` so that every rule covers a module: the shortest entries that cover no quantized one."""
    added = list[str]()
    for rule in rules:
        if rule is covers_by_name and reason in _NOT_BY_NAME:
            continue
        if not any(rule(entry, module) for entry in (*entries, *added)):
            fitting = (entry for entry in _candidates(module) if rule(entry, module))
            added += next(([entry] for entry in fitting if not _covers_any(entry, quantized, rules)), [])
    return added


def _candidates(module: str) -> Iterator[str]:
    """Entries that cover a module: suffixes of its name, then its whole name with or without a prefix."""
    parts = module.split(".")
    if re.fullmatch(r"[\w.]+", module):  # otherwise the name is not a pattern that matches itself
        yield from (".".join(parts[start:]) for start in reversed(range(len(parts))) if not parts[start].isdigit())
    if len(parts) > 1 and re.fullmatch(r"\w+", parts[0]):
        yield rf"^(?:\w+\.)?{re.escape('.'.join(parts[1:]))}$"
    yield rf"^(?:\w+\.)?{re.escape(module)}$"
    yield rf"^{re.escape(module)}$"


def _covers_any(entry: str, modules: Collection[str], rules: Sequence[SkipRule]) -> bool:
    return any(rule(entry, module) for rule in rules for module in modules)


def _with_and_without_prefix(modules: Iterator[str]) -> frozenset[str]:
    """The names, and what they become when the loader removes a base model's prefix."""
    found: set[str] = set()
    for module in modules:
        found.update((module, module.partition(".")[2] or module))
    return frozenset(found)
