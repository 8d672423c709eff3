"""Which files of a source hold the weights, which go along, and which are left behind.

Owns the file names of the ecosystem: what transformers would open, in its order, and what everything else is. Decides
from names and headers.
"""

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

from int8cli.checkpoint.header import read_header
from int8cli.checkpoint.pickled import read_pickled
from int8cli.checkpoint.source import Source, checked_file_name
from int8cli.checkpoint.tensor import ShardContents
from int8cli.errors import IndexFileError, ModelNotFoundError, UnsupportedModelError

WeightFormat = Literal["safetensors", "pickle"]

_INDEX_LIMIT_BYTES = 100_000_000
_COPY_LIMIT_BYTES = 256 * 2**20  # the largest tokenizer.json known is 33 MB
_HEADERS_AT_ONCE = 32

_SUFFIXES: dict[WeightFormat, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "pickle": (".bin", ".pt", ".pth"),
}
# transformers' order: modeling_utils.py, `_get_resolved_checkpoint_files`.
_STANDARD_NAMES: tuple[tuple[WeightFormat, str], ...] = (
    ("safetensors", "model.safetensors"),
    ("safetensors", "model.safetensors.index.json"),
    ("pickle", "pytorch_model.bin"),
    ("pickle", "pytorch_model.bin.index.json"),
)

_ADAPTER = "an adapter"
_TRAINING = "a training state"
_DUPLICATE = "a duplicate of the weights"
_VARIANT = "a variant of the weights"
_OTHER_WEIGHTS = "other weights"
_UNKNOWN = "unknown file"
_FORMATS = {
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
    ".ckpt": "TensorFlow or Lightning weights",
    ".gguf": "GGUF weights",
    ".ggml": "GGML weights",
    ".ot": "Rust weights",
    ".onnx": "an ONNX model",
    ".onnx_data": "an ONNX model",
    ".tflite": "a TensorFlow Lite model",
    ".mlmodel": "a Core ML model",
    ".mlpackage": "a Core ML model",
    ".nemo": "a NeMo archive",
    ".engine": "a TensorRT engine",
    ".npz": "NumPy weights",
    ".npy": "NumPy weights",
}
# Patterns on the whole name, first match wins. `*` crosses directories.
_LEFT_BEHIND: tuple[tuple[str, str], ...] = (
    (".*", "hidden"),
    ("*/.*", "hidden"),
    ("README.md", "replaced by a model card"),
    ("adapter_model.*", _ADAPTER),
    ("adapter_config.json", _ADAPTER),
    ("adapter/*", _ADAPTER),
    ("*/adapter_model.*", _ADAPTER),
    ("*/adapter_config.json", _ADAPTER),
    ("global_step*/*", _TRAINING),
    ("checkpoint-*/*", _TRAINING),
    ("optimizer*", _TRAINING),
    ("scheduler.*", _TRAINING),
    ("rng_state*", _TRAINING),
    ("random_states*", _TRAINING),
    ("training_args.*", _TRAINING),
    ("trainer_state.json", _TRAINING),
    ("scaler.*", _TRAINING),
    ("zero_pp_rank_*", _TRAINING),
    ("mp_rank_*", _TRAINING),
    ("events.out.tfevents.*", _TRAINING),
    ("runs/*", _TRAINING),
    ("original/*", _DUPLICATE),
    ("consolidated*", _DUPLICATE),
    ("onnx/*", _FORMATS[".onnx"]),
    ("openvino/*", "an OpenVINO model"),
    ("openvino_model*", "an OpenVINO model"),
    ("coreml/*", _FORMATS[".mlmodel"]),
    ("*.mlpackage/*", _FORMATS[".mlpackage"]),
    ("quantize_config.json", "settings of another quantization"),
    ("quant_config.json", "settings of another quantization"),
    ("hf_quant_config.json", "settings of another quantization"),
)
# Where loaders look below the root: chat templates, and the numbered modules of sentence-transformers.
_MODULE_DIRECTORY = re.compile(r"\d+_(?!Transformer\b)\w+/")
_TEXT_SUFFIXES = frozenset(
    {".json", ".jsonl", ".txt", ".yaml", ".yml", ".py", ".jinja"}
    | {".model", ".spm", ".bpe", ".codes", ".vocab", ".merges", ".tiktoken"}
)
_LEGAL_NAMES = re.compile(r"(licen[cs]e|notice|copying|use[-_]policy|acceptable[-_]use)", re.IGNORECASE)
_DOCUMENT_SUFFIXES = frozenset(
    {".md", ".rst", ".pdf", ".html", ".ipynb"} | {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4"}
)
_INDEX_NAME = re.compile(r"\.index(\.[^.]+)?\.json$")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, pytorch_model-00001-of-00002.fp16.bin
_VARIANT_NAME = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.[^.]+\.(safetensors|bin)$")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What a convert takes from a source.

    `shards` hold the weights, sorted; `weight_map` is the index's tensor → shard, None where there is no index, and
    `index_file` its name. `copied` go along as they are. `passed_over` is (file, reason) for all else, but for
    config.json and the index, which are written anew.
    """

    format: WeightFormat
    shards: tuple[str, ...]
    weight_map: dict[str, str] | None
    index_file: str | None
    index_metadata: dict[str, Any]
    copied: tuple[str, ...]
    passed_over: tuple[tuple[str, str], ...]


def find_weights(source: Source) -> WeightFiles:
    """Choose the files to convert, as transformers would choose them to load; no weight file is opened.

    Raises IndexFileError for an index that is not one or names what it must not, UnsupportedModelError where the source
    holds only an adapter or other formats, ModelNotFoundError where it holds no weights at all.
    """
    files = source.list_files()
    weight_format, entry = _entry_file(source.identity.name, files)
    weight_map: dict[str, str] | None = None
    metadata: dict[str, Any] = {}
    shards: tuple[str, ...] = (entry,)
    index_file = None
    if _INDEX_NAME.search(entry):
        index_file = entry
        weight_map, metadata = _read_index(source, entry, weight_format, frozenset(files))
        shards = tuple(sorted(set(weight_map.values())))
    rewritten = {"config.json", *shards, *((index_file,) if index_file else ())}
    copied, passed_over = [], []
    for file in files:
        if file in rewritten:
            continue
        reason = _reason_to_pass_over(file, weight_format, files) or _too_large(source, file)
        if reason:
            passed_over.append((file, reason))
        else:
            copied.append(file)
    return WeightFiles(weight_format, shards, weight_map, index_file, metadata, tuple(copied), tuple(passed_over))


def read_layouts(source: Source, weights: WeightFiles) -> tuple[ShardContents, ...]:
    """Read the header of every shard, in the order of `weights.shards`, and hold them to the index.

    Tensors that the index does not list are kept. Raises IndexFileError for a tensor that is not where the index says,
    or is in two shards, and what the formats' readers raise.
    """

    def layout(shard: str) -> ShardContents:
        with source.open(shard) as file:
            return read_contents(file, weights.format, shard, source.size_bytes(shard))

    # Over HTTP a header is three round trips; BLOOM has 72 of them: 4.6 s at 100 ms each with 8 at once, 2.8 s with 32.
    with ThreadPoolExecutor(max_workers=_HEADERS_AT_ONCE) as pool:
        layouts = tuple(pool.map(layout, weights.shards))
    homes = _homes(layouts)
    for name, shard in (weights.weight_map or {}).items():
        if homes.get(name) != shard:
            elsewhere = f"it is in {homes[name]}" if name in homes else "no shard has it"
            raise IndexFileError(f"{weights.index_file}: {shard} does not hold the tensor {name!r}; {elsewhere}")
    return layouts


def read_contents(file: BinaryIO, weight_format: WeightFormat, file_name: str, file_bytes: int) -> ShardContents:
    """One shard's tensors and their places. Raises what the format's reader raises."""
    read = read_header if weight_format == "safetensors" else read_pickled
    return read(file, file_name, file_bytes)


def _entry_file(source_name: str, files: Sequence[str]) -> tuple[WeightFormat, str]:
    """The file that leads to the weights: a single file of them, or an index.

    A source called as one of its files is that file, pointed at by the user: a variant then will do.
    """
    for weight_format, name in _STANDARD_NAMES:
        if name in files:
            return weight_format, name
    for weight_format, suffixes in _SUFFIXES.items():
        found = [file for file in files if "/" not in file and file.endswith(suffixes)]
        fitting = [file for file in found if _may_be_the_weights(file, pointed_at=file == source_name)]
        if len(fitting) == 1:
            return weight_format, fitting[0]
        if fitting:
            raise UnsupportedModelError(
                f"{len(fitting)} files could be the weights and no index says which: {_some(fitting)}",
                hint="Point at one of the files, or add the index (model.safetensors.index.json).",
            )
    raise _nothing_to_convert(files)


def _may_be_the_weights(file: str, *, pointed_at: bool) -> bool:
    if pointed_at:
        return _left_behind(file) not in (_ADAPTER, _TRAINING)
    return _left_behind(file) is None and _VARIANT_NAME.match(file) is None


def _nothing_to_convert(files: Sequence[str]) -> UnsupportedModelError | ModelNotFoundError:
    """Why there are no weights to take: what is there in their place."""
    reasons = {file: _reason_to_pass_over(file, "safetensors", files) for file in files}
    if _ADAPTER in reasons.values():
        return UnsupportedModelError(
            "an adapter is not a model: there are no base weights here",
            hint="Merge it into its base model first (peft: merge_and_unload) and convert the result.",
        )
    weights = {_OTHER_WEIGHTS, _DUPLICATE, _VARIANT, "an OpenVINO model", *_FORMATS.values()}
    found = [file for file, reason in reasons.items() if reason in weights and _looks_like_weights(file)]
    looked_for = ", ".join(name for _, name in _STANDARD_NAMES)
    if found:
        return UnsupportedModelError(
            f"no weights in a form that can be converted; there is only {_some(found)}",
            hint=f"Looked for {looked_for}, or a single .safetensors or .bin. "
            "Weights in a subdirectory can be named by its path; other formats must be converted first.",
        )
    return ModelNotFoundError(
        f"no weights among {len(files)} files",
        hint=f"Looked for {looked_for}, or a single .safetensors, .bin, .pt or .pth.",
    )


def _looks_like_weights(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in {*_FORMATS, ".safetensors", *_SUFFIXES["pickle"], ".xml"}


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _read_index(
    source: Source, index_file: str, weight_format: WeightFormat, files: frozenset[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The index's weight_map and metadata. Every file it names is a weight file of the source."""
    index = _parse_index(source, index_file)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(f"{index_file}: weight_map is {'missing' if weight_map is None else 'no map of tensors'}")
    if not isinstance(metadata, dict):
        raise IndexFileError(f"{index_file}: metadata is {metadata!r:.80}, not an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise IndexFileError(f"{index_file}: the tensor {name!r} has {shard!r:.80} where a file name belongs")
    for shard in sorted(set(weight_map.values())):
        _check_shard(shard, index_file, weight_format, files)
    return weight_map, metadata


def _check_shard(shard: str, index_file: str, weight_format: WeightFormat, files: frozenset[str]) -> None:
    try:
        checked_file_name(shard)
    except IndexFileError as error:
        raise IndexFileError(f"{index_file} names a file outside the checkpoint: {error}", hint=error.hint) from error
    if not shard.endswith(_SUFFIXES[weight_format]):
        raise IndexFileError(f"{index_file} names {shard!r}, which is no {_SUFFIXES[weight_format][0]} file")
    if shard not in files:
        raise IndexFileError(
            f"{index_file} names {shard!r}, which is not there",
            hint="The download may be incomplete: fetch the missing file and run the same command again.",
        )


def _parse_index(source: Source, index_file: str) -> dict[str, Any]:
    size_bytes = source.size_bytes(index_file)
    if size_bytes > _INDEX_LIMIT_BYTES:
        raise IndexFileError(f"{index_file} has {size_bytes:,} bytes, more than any index needs")
    with source.open(index_file) as file:
        text = file.read()
    try:
        index = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise IndexFileError(f"{index_file} is not valid JSON: {error}") from error
    if not isinstance(index, dict):
        raise IndexFileError(f"{index_file} is not a JSON object")
    return index


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} stands in it twice")
        result[key] = value
    return result


def _left_behind(file: str) -> str | None:
    return next((reason for pattern, reason in _LEFT_BEHIND if fnmatchcase(file, pattern)), None)


def _reason_to_pass_over(file: str, weight_format: WeightFormat, files: Sequence[str]) -> str | None:
    """Why a file that is no shard does not go along; None for one that does."""
    path = PurePosixPath(file)
    suffix = path.suffix.lower()
    reason = _left_behind(file) or _FORMATS.get(suffix)
    if reason:
        return reason
    if _INDEX_NAME.search(path.name):
        return "an index of weights that are not converted"
    if _MODULE_DIRECTORY.match(file):
        return _module_reason(path, files)
    if _looks_like_weights(file):
        return _weight_reason(path, weight_format)
    if len(path.parts) > 1 and path.parts[0] != "additional_chat_templates" and suffix != ".py":
        return "in a directory that loaders do not read"
    if suffix in _TEXT_SUFFIXES or _LEGAL_NAMES.match(path.name) or path.name.startswith("tokenizer."):
        return None
    return "documentation of the source" if suffix in _DOCUMENT_SUFFIXES else _UNKNOWN


def _module_reason(path: PurePosixPath, files: Sequence[str]) -> str | None:
    """For a file of a sentence-transformers module, whose own weights, a dense layer or so, go along with it."""
    if path.name == "pytorch_model.bin" and str(path.with_name("model.safetensors")) not in files:
        return None
    if path.suffix in _TEXT_SUFFIXES or path.name == "model.safetensors":
        return None
    return _weight_reason(path, "safetensors")


def _weight_reason(path: PurePosixPath, weight_format: WeightFormat) -> str:
    if weight_format == "safetensors" and path.suffix in _SUFFIXES["pickle"] and path.name.startswith("pytorch_model"):
        return "duplicate of the safetensors"
    if _VARIANT_NAME.match(path.name):
        return _VARIANT
    return _OTHER_WEIGHTS if _looks_like_weights(path.name) else _UNKNOWN


def _too_large(source: Source, file: str) -> str | None:
    size_bytes = source.size_bytes(file)
    return f"too large to be what its name says, {size_bytes:,} bytes" if size_bytes > _COPY_LIMIT_BYTES else None


def _homes(layouts: Iterable[ShardContents]) -> dict[str, str]:
    """Tensor name → shard."""
    homes: dict[str, str] = {}
    for layout in layouts:
        for tensor in layout.tensors:
            name = tensor.spec.name
            if name in homes:
                raise IndexFileError(f"the tensor {name!r} is in two shards, {homes[name]} and {layout.file_name}")
            homes[name] = layout.file_name
    return homes
