"""Whether transformers takes the output: the model is laid out on the meta device, without weights or foreign code.

Owns the use of transformers. The loader itself does the work, with its own quantizer, renamings and conversions: it is
given empty tensors of the names, dtypes and shapes that the output holds, and says which found no place.
"""

import contextlib
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.tensor import TensorSpec
from int8cli.planning.layouts import LAYOUTS
from int8cli.records.store import ShardRecord
from int8cli.results.verification import Check, Failure
from int8cli.verification.float_dtypes import cast_problems, rounding_problems

NAME = "loads"
_READS_NO_MIXTURE = "cannot read mixtures of experts in this layout; vLLM can"
# What each layout's loader consists of, by the names that are imported.
_PACKAGES = {
    "bitsandbytes": ("transformers", "accelerate", "bitsandbytes"),
    "compressed-tensors": ("transformers", "accelerate", "compressed_tensors"),
}


class _UnknownModelError(Exception):
    """This transformers has no class of its own for the model."""


@dataclass(frozen=True, slots=True)
class _LaidOut:
    """A model on the meta device, and what of it and of the tensors did not find the other, by the loader's names."""

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: tuple[tuple[str, Any, Any], ...]


def absent_packages(layout: str) -> list[str]:
    """What the loader of a layout consists of and is not installed here. Imports nothing."""
    return [name for name in _PACKAGES[layout] if importlib.util.find_spec(name) is None]


def is_imported(layout: str) -> bool:
    """Whether this process has imported the loader of a layout already."""
    return all(sys.modules.get(name) is not None for name in _PACKAGES[layout])


def check_loads(directory: Path, layout: str, records: Sequence[ShardRecord]) -> Check:
    """Lay the model out as `from_pretrained` would; every tensor must find its module, every module its tensors.

    What a model of this class does not find in the source either, or does not take from it, is no failure. All that
    the loader consists of must be installed.
    """
    with _silence():
        try:
            import transformers
        except Exception as error:  # an installation that is broken says nothing of the model
            return Check.not_made(NAME, f"transformers cannot be imported here: {_first_line(error)}")
        loader = f"transformers {transformers.__version__}"
        held = [TensorSpec(t.name, t.dtype, t.shape) for record in records for t in record.files[0].tensors]
        reads = LAYOUTS[layout].transformers_reads(spec.name for spec in held)
        try:
            model_class, config = _class_of(directory)
            laid_out = _lay_out(model_class, config, held)
        except _UnknownModelError as error:
            return Check.not_made(NAME, f"{loader} {error}; the model's own code is not run")
        except ImportError as error:
            return Check.not_made(NAME, f"{loader} needs more for this model: {_first_line(error)}")
        except Exception as error:  # whatever the loader raises, it would raise at the user
            if not reads:
                return Check.not_made(NAME, f"{loader} {_READS_NO_MIXTURE} ({_first_line(error)})")
            return Check.of(NAME, loader, [Failure(CONFIG_FILE, f"the loader rejects it: {_first_line(error)}")])
        specs = [spec for record in records for spec in record.source_tensors]
        source = _source_laid_out(model_class, config, specs)

        def missing_without(rest: Sequence[TensorSpec]) -> frozenset[str]:
            return _source_laid_out(model_class, config, rest).missing - source.missing

        landed, failures = _compare(laid_out, source)
        if source.model is not None:
            failures += cast_problems(laid_out.model, source.model)
            failures += rounding_problems(source.model, records, missing_without)
    if failures and not reads:  # some versions pass over what they do not know
        return Check.not_made(NAME, f"{loader} {_READS_NO_MIXTURE} ({failures[0][0]} {failures[0][1]})")
    wanted = sum(len(record.layers) for record in records)
    if landed > wanted and not failures:
        failures = [("", f"{landed:,} layers of the model are in int8, {wanted:,} were quantized")]
    detail = f"{loader}, {model_class.__name__}: {landed:,} of {wanted:,} int8 layers in place"
    shards = {tensor.name: record.files[0].file for record in records for tensor in record.files[0].tensors}
    found = [Failure(shards.get(name, CONFIG_FILE), what, name or None) for name, what in failures]
    return Check.of(NAME, detail, found)


def _class_of(directory: Path) -> tuple[Any, Any]:
    """The model's class in transformers, and its config. Raises _UnknownModelError."""
    import transformers

    stated = json.loads((directory / CONFIG_FILE).read_bytes())
    if stated.get("model_type") not in transformers.CONFIG_MAPPING:
        raise _UnknownModelError(f"does not know the model type {stated.get('model_type')!r}")
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    name = next(iter(config.architectures or ()), None)
    if name is None:
        model_class = transformers.MODEL_MAPPING.get(type(config), None)
    else:
        model_class = getattr(transformers, name, None)
    if model_class is None:
        raise _UnknownModelError(f"has no class {name!r}")
    return model_class, config


def _lay_out(model_class: Any, config: Any, specs: Iterable[TensorSpec]) -> _LaidOut:
    """What `from_pretrained` makes of these tensors, all of them on the meta device."""
    import torch

    from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES

    def empty(spec: TensorSpec) -> torch.Tensor:
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")

    model, info = model_class.from_pretrained(
        None,
        config=config,
        # Of the packed floats no torch has all; none of them is a weight here.
        state_dict={spec.name: empty(spec) for spec in specs if spec.dtype in TORCH_DTYPES},
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
    )
    mismatched = tuple(tuple(each) for each in info["mismatched_keys"])
    return _LaidOut(model, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched)


def _source_laid_out(model_class: Any, config: Any, specs: Iterable[TensorSpec]) -> _LaidOut:
    """The same for the source as it was; one that the loader would refuse excuses nothing."""
    plain = type(config).from_dict({**config.to_dict(), "quantization_config": None})
    del plain.quantization_config
    try:
        return _lay_out(model_class, plain, specs)
    except Exception:
        return _LaidOut(None, frozenset(), frozenset(), ())


def _compare(output: _LaidOut, source: _LaidOut) -> tuple[int, list[tuple[str, str]]]:
    """How many modules hold int8, and what of the output did not find its place though the source's did."""
    failures = [(name, "is missing, but the model needs it") for name in sorted(output.missing - source.missing)]
    for name in sorted(output.unexpected):
        if not any(name.startswith(unused) for unused in source.unexpected):
            failures.append((name, "does not exist in the model"))
    for name, found, wanted in output.mismatched:
        failures.append((name, f"is {list(found)}, the model needs {list(wanted)}"))
    modules = list(_modules(output.model))
    failures += [(name, problem) for name, problem in modules if problem is not None]
    return sum(1 for _, problem in modules if problem is None), failures


def _modules(model: Any) -> Iterator[tuple[str, str | None]]:
    """Each weight that is in int8 on either side, the file's or the loader's, and what is wrong with it if anything."""
    import torch

    for module_name, module in model.named_modules():
        takes_int8 = type(module).__name__ == "Linear8bitLt" or hasattr(module, "quantization_scheme")
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if takes_int8 and name == "weight":
                wanted = (module.out_features, module.in_features)
                if parameter.dtype != torch.int8:
                    yield full_name, f"is {parameter.dtype}, where the loader puts int8"
                elif tuple(parameter.shape) != wanted:
                    yield full_name, f"is {list(parameter.shape)}, the model needs {list(wanted)}"
                else:
                    yield full_name, None
            elif parameter.dtype == torch.int8:
                yield full_name, f"is int8, which a {type(module).__name__} does not take"


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the loader's own reports from the terminal: what matters of them becomes failures."""
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
