"""Checks that transformers can load the output. It builds the model on the meta device, without weights.

Owns the use of transformers. The loader does the work, with its own quantizer, renamings and conversions: it gets empty
tensors with the names, dtypes and shapes of the output, and reports those it cannot use. Code in the model's repository
is never run.
"""

import contextlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.expressions import MATCHES_AT_MOST, slow, strings_in
from int8cli.planning.layouts import LAYOUTS
from int8cli.records.shard_record import ShardRecord
from int8cli.results.verification import Check, Failure
from int8cli.typed_json import shown
from int8cli.verification.float_dtypes import cast_problems, rounding_problems
from int8cli.verification.heads import kept_by_loader

NAME = "loads"
_READS_NO_MIXTURE = "cannot read mixtures of experts in this layout; vLLM can"
# The packages that the loader of each layout needs, by their import names.
_PACKAGES = {
    "bitsandbytes": ("transformers", "accelerate", "bitsandbytes"),
    "compressed-tensors": ("transformers", "accelerate", "compressed_tensors"),
}


class _UnknownModelError(Exception):
    """The installed transformers has no class for the model."""


class _SlowExpressionError(Exception):
    """The loader could be busy with the config's expressions for any time."""


@dataclass(frozen=True, slots=True)
class _BuiltModel:
    """A model on the meta device, with the loader's lists of parameters and tensors that do not match."""

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: tuple[tuple[str, Any, Any], ...]


def absent_packages(layout: str) -> list[str]:
    """The packages that the loader of a layout needs and that are not installed. Imports nothing."""
    return [name for name in _PACKAGES[layout] if importlib.util.find_spec(name) is None]


def is_imported(layout: str) -> bool:
    """Whether this process has already imported the loader of a layout."""
    return all(sys.modules.get(name) is not None for name in _PACKAGES[layout])


def check_loads(directory: Path, layout: str, records: Sequence[ShardRecord]) -> Check:
    """Build the model with `from_pretrained`. Every tensor must have a module, and every module its tensors.

    Differences that also occur when the source is loaded are not failures. The packages of the loader must be
    installed.
    """
    with _silence():
        try:
            import transformers
        except Exception as error:  # a broken installation says nothing about the model
            raise_if_of_the_system(error)
            return Check.not_made(NAME, f"transformers cannot be imported here: {_first_line(error)}")
        loader = f"transformers {transformers.__version__}"
        specs = [TensorSpec(t.name, t.dtype, t.shape) for record in records for t in record.files[0].tensors]
        reads = LAYOUTS[layout].transformers_reads(spec.name for spec in specs)
        try:
            _refuse_slow_expressions(directory, specs)
            model_class, config = _class_of(directory)
            built = _build(model_class, config, specs)
        except _UnknownModelError as error:
            return Check.not_made(NAME, f"{loader} {error}; the model's own code is not run")
        except _SlowExpressionError as error:
            return Check.not_made(NAME, str(error))
        except ImportError as error:
            raise_if_of_the_system(error)
            return Check.not_made(NAME, f"{loader} needs more for this model: {_first_line(error)}")
        except Exception as error:  # whatever the loader raises here, users would see too
            raise_if_of_the_system(error)
            if not reads:
                return Check.not_made(NAME, f"{loader} {_READS_NO_MIXTURE} ({_first_line(error)})")
            return Check.of(NAME, loader, [Failure(CONFIG_FILE, f"the loader rejects it: {_first_line(error)}")])
        source_specs = [spec for record in records for spec in record.source_tensors]
        source = _built_from_source(model_class, config, source_specs)

        def missing_without(rest: Sequence[TensorSpec]) -> frozenset[str]:
            return _built_from_source(model_class, config, rest).missing - source.missing

        in_place, failures = _compare(built, source, {spec.name: spec.dtype for spec in specs})
        if source.model is not None:
            failures += cast_problems(built.model, source.model)
            failures += rounding_problems(source.model, records, missing_without)
    if failures and not reads:  # some versions ignore tensors that they do not know
        return Check.not_made(NAME, f"{loader} {_READS_NO_MIXTURE} ({failures[0][0]} {failures[0][1]})")
    wanted = sum(len(record.layers) for record in records)
    if in_place > wanted and not failures:
        failures = [("", f"{in_place:,} layers of the model are in int8, {wanted:,} were quantized")]
    detail = f"{loader}, {model_class.__name__}: {in_place:,} of {wanted:,} int8 layers in place"
    shards = {tensor.name: record.files[0].file for record in records for tensor in record.files[0].tensors}
    found = [Failure(shards.get(name, CONFIG_FILE), what, name or None) for name, what in failures]
    return Check.of(NAME, detail, found)


def _refuse_slow_expressions(directory: Path, specs: Sequence[TensorSpec]) -> None:
    """Raises _SlowExpressionError."""
    stated = read_config(DirectorySource(directory)).get("quantization_config")
    entries = list(strings_in(stated))
    if len(entries) * len(specs) > MATCHES_AT_MOST:
        raise _SlowExpressionError(f"quantization_config has {len(entries):,} texts, which is too many to match")
    if found := slow(entries, [spec.name for spec in specs]):
        raise _SlowExpressionError(f"{shown(found[0])} in quantization_config could take years to match")


def _class_of(directory: Path) -> tuple[Any, Any]:
    """The model's class in transformers, and its config. Raises _UnknownModelError."""
    import transformers

    stated = read_config(DirectorySource(directory))
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


def _build(model_class: Any, config: Any, specs: Iterable[TensorSpec]) -> _BuiltModel:
    """The model that `from_pretrained` builds from these tensors, all of them on the meta device."""
    import torch

    from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
    from int8cli.model.loading import as_large_as

    def empty(spec: TensorSpec) -> torch.Tensor:
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")

    # Of the packed floats no torch has all; none of them is a weight here.
    state_dict = {spec.name: empty(spec) for spec in specs if spec.dtype in TORCH_DTYPES}
    with as_large_as(len(state_dict)):
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    mismatched = tuple(tuple(each) for each in info["mismatched_keys"])
    return _BuiltModel(model, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched)


def _built_from_source(model_class: Any, config: Any, specs: Iterable[TensorSpec]) -> _BuiltModel:
    """The same for the source. If the loader rejects the source, there are no differences to subtract."""
    plain = type(config).from_dict({**config.to_dict(), "quantization_config": None})
    del plain.quantization_config
    try:
        return _build(model_class, plain, specs)
    except Exception as error:
        raise_if_of_the_system(error)
        return _BuiltModel(None, frozenset(), frozenset(), ())


def _compare(output: _BuiltModel, source: _BuiltModel, dtypes: Mapping[str, str]) -> tuple[int, list[tuple[str, str]]]:
    """The number of int8 modules, and the differences of the output that the source does not have."""
    failures = [(name, "is missing, but the model needs it") for name in sorted(output.missing - source.missing)]
    for name in sorted(output.unexpected):
        if not any(name.startswith(unused) for unused in source.unexpected):
            failures.append((name, "does not exist in the model"))
    for name, found, wanted in output.mismatched:
        failures.append((name, f"is {list(found)}, the model needs {list(wanted)}"))
    modules = list(_modules(output.model, dtypes))
    failures += [(name, problem) for name, problem in modules if problem is not None]
    kept = kept_by_loader(source.model) if source.model is not None else frozenset()
    in_int8 = {name.rpartition(".")[0] for name, problem in modules if problem is None}
    failures += [
        (f"{name}.weight", "is in int8, and transformers keeps it as a float") for name in sorted(kept & in_int8)
    ]
    return sum(1 for _, problem in modules if problem is None), failures


def _modules(model: Any, dtypes: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Each weight that is int8 in the file or for the loader, and what is wrong with it, None if nothing is.

    `dtypes` are those of the output's tensors. They take precedence over those of the model: a parameter on the meta
    device may keep the dtype of the model's definition (transformers 5.0.0).
    """
    import torch

    from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES

    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for module_name, module in model.named_modules():
        takes_int8 = type(module).__name__ == "Linear8bitLt" or hasattr(module, "quantization_scheme")
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            stored = dtypes.get(full_name) or dtypes.get(full_name.removeprefix(prefix))
            dtype = TORCH_DTYPES.get(stored or "", parameter.dtype)
            if takes_int8 and name in ("weight", "weight_packed"):
                packed = name == "weight_packed"
                wanted = (module.out_features, module.in_features // (4 if packed else 1))
                if dtype != (torch.int32 if packed else torch.int8):
                    yield full_name, f"is {dtype}, but the loader expects {'int32' if packed else 'int8'}"
                elif tuple(parameter.shape) != wanted:
                    yield full_name, f"is {list(parameter.shape)}, the model needs {list(wanted)}"
                else:
                    yield full_name, None
            elif dtype == torch.int8:
                yield full_name, f"is int8, which a {type(module).__name__} does not support"


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide the loader's own messages. The relevant ones become failures."""
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
