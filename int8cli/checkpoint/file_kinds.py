"""What each file of a source is, by its name, and whether a conversion copies it.

Owns the file names of the ecosystem, except those that lead to the weights. Opens nothing.
"""

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal

from int8cli.checkpoint.output_names import is_own

WeightFormat = Literal["safetensors", "pickle"]

SUFFIXES: dict[WeightFormat, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "pickle": (".bin", ".pt", ".pth"),
}

ADAPTER = "an adapter"
TRAINING = "a training state"
DUPLICATE = "a duplicate of the weights"
VARIANT = "a variant of the weights"
OTHER_WEIGHTS = "other weights"
_UNKNOWN = "unknown file"
FORMATS = {
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
# Patterns on the whole name, and why a file is not copied. The first match counts. `*` also matches `/`.
_NOT_COPIED: tuple[tuple[str, str], ...] = (
    (".*", "hidden"),
    ("*/.*", "hidden"),
    ("README.md", "replaced by a model card"),
    ("adapter_model.*", ADAPTER),
    ("adapter_config.json", ADAPTER),
    ("adapter/*", ADAPTER),
    ("*/adapter_model.*", ADAPTER),
    ("*/adapter_config.json", ADAPTER),
    ("global_step*/*", TRAINING),
    ("checkpoint-*/*", TRAINING),
    ("optimizer*", TRAINING),
    ("scheduler.*", TRAINING),
    ("rng_state*", TRAINING),
    ("random_states*", TRAINING),
    ("training_args.*", TRAINING),
    ("trainer_state.json", TRAINING),
    ("scaler.*", TRAINING),
    ("zero_pp_rank_*", TRAINING),
    ("mp_rank_*", TRAINING),
    ("events.out.tfevents.*", TRAINING),
    ("runs/*", TRAINING),
    ("original/*", DUPLICATE),
    ("consolidated*", DUPLICATE),
    ("onnx/*", FORMATS[".onnx"]),
    ("openvino/*", "an OpenVINO model"),
    ("openvino_model*", "an OpenVINO model"),
    ("coreml/*", FORMATS[".mlmodel"]),
    ("*.mlpackage/*", FORMATS[".mlpackage"]),
    ("quantize_config.json", "settings of another quantization"),
    ("quant_config.json", "settings of another quantization"),
    ("hf_quant_config.json", "settings of another quantization"),
)
# Where loaders look below the root: chat templates, the modules of sentence-transformers, which number theirs, and what
# a processor has of its own beside the model's tokenizer.
_MODULE_DIRECTORY = re.compile(r"(?:[A-Za-z]+_)?\d+_(?!\w*Transformer\b)\w+/")
_PROCESSOR_DIRECTORY = re.compile(r"\w*(?:tokenizer|processor|feature_extractor)\w*/", re.IGNORECASE)
_TEXT_SUFFIXES = frozenset(
    {".json", ".jsonl", ".txt", ".yaml", ".yml", ".py", ".jinja"}
    | {".model", ".spm", ".bpe", ".codes", ".vocab", ".merges", ".tiktoken"}
)
_LEGAL_NAMES = re.compile(r"(licen[cs]e|notice|copying|use[-_]policy|acceptable[-_]use)", re.IGNORECASE)
_DOCUMENT_SUFFIXES = frozenset(
    {".md", ".rst", ".pdf", ".html", ".ipynb"} | {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4"}
)
INDEX_NAME = re.compile(r"\.index(\.[^.]+)?\.json$")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, pytorch_model-00001-of-00002.fp16.bin
VARIANT_NAME = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.[^.]+\.(safetensors|bin)$")


def looks_like_weights(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in {*FORMATS, ".safetensors", *SUFFIXES["pickle"], ".xml"}


def reason_by_pattern(file: str) -> str | None:
    """Why a file is not copied, if one of the patterns says so."""
    return next((reason for pattern, reason in _NOT_COPIED if fnmatchcase(file, pattern)), None)


def reason_to_pass_over(
    file: str, weight_format: WeightFormat, files: Sequence[str], module_directories: Collection[str] = ()
) -> str | None:
    """Why a file that is no shard is not copied; None for one that is.

    `module_directories` are those which the source itself says that sentence-transformers reads.
    """
    if is_own(file):
        return "in the directory of int8cli's own files"
    path = PurePosixPath(file)
    suffix = path.suffix.lower()
    reason = reason_by_pattern(file) or FORMATS.get(suffix)
    if reason:
        return reason
    if INDEX_NAME.search(path.name):
        return "an index of weights that are not converted"
    of_a_module = any(file.startswith(f"{directory}/") for directory in module_directories)
    if of_a_module or _MODULE_DIRECTORY.match(file) or _PROCESSOR_DIRECTORY.match(file):
        return _module_reason(path, files)
    if looks_like_weights(file):
        return _weight_reason(path, weight_format)
    if len(path.parts) > 1 and path.parts[0] != "additional_chat_templates" and suffix != ".py":
        return "in a directory that loaders do not read"
    if suffix in _TEXT_SUFFIXES or _LEGAL_NAMES.match(path.name) or path.name.startswith("tokenizer."):
        return None
    return "documentation of the source" if suffix in _DOCUMENT_SUFFIXES else _UNKNOWN


def _module_reason(path: PurePosixPath, files: Sequence[str]) -> str | None:
    """The reason for a file of a sentence-transformers module. Its weights, such as a dense layer, are copied."""
    if path.name == "pytorch_model.bin" and str(path.with_name("model.safetensors")) not in files:
        return None
    if path.suffix in _TEXT_SUFFIXES or path.name == "model.safetensors":
        return None
    return _weight_reason(path, "safetensors")


def _weight_reason(path: PurePosixPath, weight_format: WeightFormat) -> str:
    if weight_format == "safetensors" and path.suffix in SUFFIXES["pickle"] and path.name.startswith("pytorch_model"):
        return "duplicate of the safetensors"
    if VARIANT_NAME.match(path.name):
        return VARIANT
    return OTHER_WEIGHTS if looks_like_weights(path.name) else _UNKNOWN
