"""Which files of a source hold the weights, and their headers.

Owns the order in which transformers looks for them. `index` reads an index, `file_kinds` classifies the other files.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from int8cli.checkpoint.file_kinds import (
    ADAPTER,
    DUPLICATE,
    FORMATS,
    INDEX_NAME,
    OTHER_WEIGHTS,
    SUFFIXES,
    TRAINING,
    VARIANT,
    VARIANT_NAME,
    WeightFormat,
    looks_like_weights,
    reason_by_pattern,
    reason_to_pass_over,
)
from int8cli.checkpoint.header import read_header
from int8cli.checkpoint.index import read_index
from int8cli.checkpoint.pickled import read_pickled
from int8cli.checkpoint.sentence_modules import module_directories
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.errors import IndexFileError, ModelNotFoundError, UnsupportedModelError

_COPY_LIMIT_BYTES = 256 * 2**20  # the largest tokenizer.json known is 33 MB
_HEADERS_AT_ONCE = 32
_SHARD_NAME = re.compile(r"-\d+-of-(?P<count>\d+)\.")

# transformers' order: modeling_utils.py, `_get_resolved_checkpoint_files`.
_STANDARD_NAMES: tuple[tuple[WeightFormat, str], ...] = (
    ("safetensors", "model.safetensors"),
    ("safetensors", "model.safetensors.index.json"),
    ("pickle", "pytorch_model.bin"),
    ("pickle", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a source, sorted by what a conversion does with them.

    `shards` hold the weights, sorted by name. `weight_map` is the index's tensor → shard, and `index_file` its name;
    both are None without an index. `copied` files are copied unchanged. `passed_over` is (file, reason) for all others,
    except config.json and the index, which are rewritten.
    """

    format: WeightFormat
    shards: tuple[str, ...]
    weight_map: dict[str, str] | None
    index_file: str | None
    index_metadata: dict[str, Any]
    copied: tuple[str, ...]
    passed_over: tuple[tuple[str, str], ...]


def find_weights(source: Source) -> WeightFiles:
    """Choose the files to convert, as transformers would choose them to load. Opens no weight file.

    Raises IndexFileError for an index that is invalid or names a forbidden file, UnsupportedModelError if the source
    has only an adapter or other formats, ModelNotFoundError if it has no weights at all.
    """
    files = source.list_files()
    weight_format, entry = _entry_file(source.identity.name, files)
    weight_map: dict[str, str] | None = None
    metadata: dict[str, Any] = {}
    shards: tuple[str, ...] = (entry,)
    index_file = None
    if INDEX_NAME.search(entry):
        index_file = entry
        weight_map, metadata = read_index(source, entry, weight_format, frozenset(files))
        shards = tuple(sorted(set(weight_map.values())))
    rewritten = {"config.json", *shards, *((index_file,) if index_file else ())}
    directories = module_directories(source, files)
    copied, passed_over = [], []
    for file in files:
        if file in rewritten:
            continue
        reason = reason_to_pass_over(file, weight_format, files, directories) or _too_large(source, file)
        if reason:
            passed_over.append((file, reason))
        else:
            copied.append(file)
    return WeightFiles(weight_format, shards, weight_map, index_file, metadata, tuple(copied), tuple(passed_over))


def read_headers(source: Source, weights: WeightFiles) -> tuple[ShardContents, ...]:
    """Read the header of every shard, in the order of `weights.shards`, and compare them with the index.

    Tensors that the index does not list are included. Raises IndexFileError for a tensor that is not in the shard that
    the index names, or is in two shards, and the errors of the formats' readers.
    """

    def read(shard: str) -> ShardContents:
        with source.open(shard) as file:
            return read_contents(file, weights.format, shard, source.size_bytes(shard))

    # Over HTTP a header is three round trips; BLOOM has 72 of them: 4.6 s at 100 ms each with 8 at once, 2.8 s with 32.
    with ThreadPoolExecutor(max_workers=_HEADERS_AT_ONCE) as pool:
        shards = tuple(pool.map(read, weights.shards))
    homes = _homes(shards)
    for name, shard in (weights.weight_map or {}).items():
        if homes.get(name) != shard:
            elsewhere = f"it is in {homes[name]}" if name in homes else "no shard has it"
            raise IndexFileError(f"{weights.index_file}: {shard} does not contain the tensor {name!r}; {elsewhere}")
    return shards


def read_contents(file: BinaryIO, weight_format: WeightFormat, file_name: str, file_bytes: int) -> ShardContents:
    """One shard's tensors and their places. Raises the errors of the format's reader."""
    read = read_header if weight_format == "safetensors" else read_pickled
    return read(file, file_name, file_bytes)


def _entry_file(source_name: str, files: Sequence[str]) -> tuple[WeightFormat, str]:
    """The file to start from: a single weight file, or an index.

    A file that the user named is used even if it is a variant.
    """
    _refuse_part_of_a_model(source_name, files)
    for weight_format, name in _STANDARD_NAMES:
        if name in files:
            return weight_format, name
    for weight_format, suffixes in SUFFIXES.items():
        found = [file for file in files if "/" not in file and file.endswith(suffixes)]
        fitting = [file for file in found if _may_be_the_weights(file, named=file == source_name)]
        if len(fitting) == 1 and _shards_of(fitting[0]) <= 1:
            return weight_format, fitting[0]
        indexes = [file for file in files if file.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        if fitting and len(indexes) == 1 and "/" not in indexes[0]:
            return weight_format, indexes[0]
        if fitting:
            raise _ambiguous(fitting)
    raise _nothing_to_convert(files)


def _refuse_part_of_a_model(source_name: str, files: Sequence[str]) -> None:
    """Raise UnsupportedModelError if the user named one of several shards, or the index of all."""
    if source_name not in files:
        return
    if INDEX_NAME.search(source_name):
        raise UnsupportedModelError(f"{source_name} is an index", hint="Give the directory that it is in.")
    if _shards_of(source_name) > 1:
        raise UnsupportedModelError(
            f"{source_name} is one of {_shards_of(source_name)} shards of a model",
            hint="Give the directory with all of them and their index.",
        )


def _shards_of(file: str) -> int:
    """How many shards a file's name says there are; 1 where it says nothing."""
    found = _SHARD_NAME.search(file)
    return int(found["count"]) if found else 1


def _ambiguous(fitting: Sequence[str]) -> UnsupportedModelError:
    """The error for several files of weights without an index."""
    if any(_shards_of(file) > 1 for file in fitting):
        return UnsupportedModelError(
            f"{_some(fitting)}: shards of a model, without the index that names them all",
            hint="Fetch the index (its name ends in .index.json) from where the shards are.",
        )
    return UnsupportedModelError(
        f"{len(fitting)} files could be the weights, and no index names them: {_some(fitting)}",
        hint="Name one of the files, or add the index (model.safetensors.index.json).",
    )


def _may_be_the_weights(file: str, *, named: bool) -> bool:
    if named:
        return reason_by_pattern(file) not in (ADAPTER, TRAINING)
    return reason_by_pattern(file) is None and VARIANT_NAME.match(file) is None


def _nothing_to_convert(files: Sequence[str]) -> UnsupportedModelError | ModelNotFoundError:
    """The error for a checkpoint without usable weights. It names what was found instead."""
    reasons = {file: reason_to_pass_over(file, "safetensors", files) for file in files}
    if ADAPTER in reasons.values():
        return UnsupportedModelError(
            "this is an adapter, without the weights of its base model",
            hint="Merge it into its base model first (peft: merge_and_unload) and convert the result.",
        )
    weights = {OTHER_WEIGHTS, DUPLICATE, VARIANT, "an OpenVINO model", *FORMATS.values()}
    found = [file for file, reason in reasons.items() if reason in weights and looks_like_weights(file)]
    looked_for = ", ".join(name for _, name in _STANDARD_NAMES)
    if found and all(reasons[file] == VARIANT for file in found):
        return UnsupportedModelError(
            f"only a variant of the weights: {_some(found)}; loaders open it under its name alone",
            hint="Give the path of that file.",
        )
    if found:
        return UnsupportedModelError(
            f"no weights in a supported format; found only {_some(found)}",
            hint=f"Looked for {looked_for}, or a single .safetensors or .bin. "
            "For weights in a subdirectory, give its path. Other formats must be converted first.",
        )
    return ModelNotFoundError(
        f"no weights among {len(files)} file{'s' if len(files) > 1 else ''}" if files else "the directory is empty",
        hint=f"Looked for {looked_for}, or a single .safetensors, .bin, .pt or .pth.",
    )


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _too_large(source: Source, file: str) -> str | None:
    size_bytes = source.size_bytes(file)
    return f"too large for its name: {size_bytes:,} bytes" if size_bytes > _COPY_LIMIT_BYTES else None


def _homes(shards: Iterable[ShardContents]) -> dict[str, str]:
    """Tensor name → shard. Raises IndexFileError for a tensor in two shards."""
    homes: dict[str, str] = {}
    for contents in shards:
        for tensor in contents.tensors:
            name = tensor.spec.name
            if name in homes:
                raise IndexFileError(f"the tensor {name!r} is in two shards, {homes[name]} and {contents.file_name}")
            homes[name] = contents.file_name
    return homes
