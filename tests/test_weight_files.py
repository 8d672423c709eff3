"""Which files of a checkpoint are converted, copied, or left out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.weight_files import WeightFiles, find_weights, read_headers
from int8cli.errors import (
    CorruptShardError,
    IndexFileError,
    Int8cliError,
    ModelNotFoundError,
    UnsafePickleError,
    UnsupportedModelError,
)

INDEX = "model.safetensors.index.json"


def make(root: Path, *names: str) -> DirectorySource:
    """A directory of files that are never opened. Only their names matter."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"never opened")
    return DirectorySource(root)


def write_index(root: Path, weight_map: Any, name: str = INDEX) -> None:
    (root / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))


def sharded(root: Path) -> DirectorySource:
    """Two real shards, named as bigscience/bloom's, and their index."""
    save_file({"h.0.weight": torch.ones(2, 2)}, root / "model_00001-of-00002.safetensors")
    save_file({"h.1.weight": torch.ones(2, 2)}, root / "model_00002-of-00002.safetensors")
    write_index(root, {f"h.{i}.weight": f"model_0000{i + 1}-of-00002.safetensors" for i in (1, 0)})
    return DirectorySource(root)


def left(weights: WeightFiles) -> dict[str, str]:
    return dict(weights.passed_over)


PREFERENCE = ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("first", range(len(PREFERENCE)))
def test_weight_files_are_chosen_in_the_order_of_transformers(first: int, tmp_path: Path) -> None:
    names = PREFERENCE[first:]
    make(tmp_path, *names, "a-1.safetensors", "a-1.bin")
    for name, shard in ((INDEX, "a-1.safetensors"), ("pytorch_model.bin.index.json", "a-1.bin")):
        if name in names:
            write_index(tmp_path, {"w": shard}, name)
    weights = find_weights(DirectorySource(tmp_path))
    assert weights.shards == (("model.safetensors",), ("a-1.safetensors",), ("pytorch_model.bin",), ("a-1.bin",))[first]
    assert weights.format == ("safetensors" if first < 2 else "pickle")
    assert weights.index_file == (names[0] if names[0].endswith(".json") else None)
    assert weights.weight_map == ({"w": weights.shards[0]} if weights.index_file else None)


def test_shard_names_come_from_the_index_not_from_a_pattern(tmp_path: Path) -> None:
    weights = find_weights(sharded(tmp_path))
    assert weights.shards == ("model_00001-of-00002.safetensors", "model_00002-of-00002.safetensors")
    assert weights.index_metadata == {"total_size": 8}
    assert weights.copied == ()
    assert weights.passed_over == ()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "model.pt", "model.pth"])
def test_a_single_file_with_another_name_is_used(name: str, tmp_path: Path) -> None:
    source = make(tmp_path, name, "config.json", "training_args.bin", "adapter_model.safetensors", "optimizer.pt")
    assert find_weights(source).shards == (name,)


def test_two_files_of_other_names_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"2 files.*a\.safetensors, b\.safetensors"):
        find_weights(make(tmp_path, "a.safetensors", "b.safetensors"))


def test_a_variant_is_used_only_if_the_user_names_it(tmp_path: Path) -> None:
    make(tmp_path, "model.fp16.safetensors", "config.json")
    with pytest.raises(UnsupportedModelError, match=r"only a variant of the weights: model\.fp16\.safetensors"):
        find_weights(DirectorySource(tmp_path))
    assert find_weights(DirectorySource(tmp_path / "model.fp16.safetensors")).shards == ("model.fp16.safetensors",)


_COPIED = """
    LICENSE LICENSE.md NOTICE.txt USE_POLICY.md added_tokens.json additional_chat_templates/tool_use.jinja
    chat_template.jinja chat_template.json config_sentence_transformers.json generation_config.json merges.txt
    1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors 3_Dense/pytorch_model.bin
    modeling_custom.py modules.json preprocessor_config.json processor_config.json sentence_bert_config.json
    sentencepiece.bpe.model special_tokens_map.json spiece.model tokenizer.json tokenizer.model
    tokenizer_config.json vocab.json vocab.txt tokenizer.model.v3 layers/attention.py
"""
COPIED = _COPIED.split()

PASSED_OVER = {
    "README.md": "replaced by a model card",
    "adapter_model.safetensors": "an adapter",
    "adapter_config.json": "an adapter",
    "optimizer.bin": "a training state",
    "optimizer.pt": "a training state",
    "scheduler.pt": "a training state",
    "scaler.pt": "a training state",
    "rng_state_0.pth": "a training state",
    "training_args.bin": "a training state",
    "trainer_state.json": "a training state",
    "global_step100/mp_rank_00_model_states.pt": "a training state",
    "checkpoint-500/model.safetensors": "a training state",
    "flax_model.msgpack": "Flax weights",
    "tf_model.h5": "TensorFlow weights",
    "model-q4.gguf": "GGUF weights",
    "rust_model.ot": "Rust weights",
    "onnx/model.onnx": "an ONNX model",
    "onnx/config.json": "an ONNX model",
    "model.onnx_data": "an ONNX model",
    "model.tflite": "a TensorFlow Lite model",
    "openvino_model.xml": "an OpenVINO model",
    "openvino/openvino_model.bin": "an OpenVINO model",
    "coreml/model.mlpackage/Data/weight.bin": "a Core ML model",
    "consolidated.safetensors": "a duplicate of the weights",
    "consolidated.00.pth": "a duplicate of the weights",
    "original/consolidated.00.pth": "a duplicate of the weights",
    "original/params.json": "a duplicate of the weights",
    "model.fp16.safetensors": "a variant of the weights",
    "model.fp16-00001-of-00002.safetensors": "a variant of the weights",
    "model-00001-of-00002.fp16.safetensors": "a variant of the weights",
    "pytorch_model.bin": "duplicate of the safetensors",
    "pytorch_model-00001-of-00002.bin": "duplicate of the safetensors",
    "pytorch_model.bin.index.json": "an index of weights that are not converted",
    "2_Dense/pytorch_model.bin": "duplicate of the safetensors",
    "vae/model.safetensors": "other weights",
    "text_encoder/config.json": "in a directory that loaders do not read",
    "quantize_config.json": "settings of another quantization",
    "figure.png": "documentation of the source",
    "BENCHMARKS.md": "documentation of the source",
    "archive.tar.gz": "unknown file",
    "blob": "unknown file",
}


def test_every_file_is_converted_copied_rewritten_or_named(tmp_path: Path) -> None:
    source = make(tmp_path, "model.safetensors", "config.json", *COPIED, *PASSED_OVER)
    weights = find_weights(source)
    assert sorted(weights.copied) == sorted(COPIED)
    assert left(weights) == PASSED_OVER
    assert {*weights.copied, *left(weights), "model.safetensors", "config.json"} == set(source.list_files())


def test_a_huge_file_with_the_name_of_a_tokenizer_file_is_not_copied(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors")
    with (tmp_path / "vocab.json").open("wb") as file:
        file.truncate(2**30)
    assert "too large" in left(find_weights(DirectorySource(tmp_path)))["vocab.json"]


def test_with_both_formats_no_bin_is_opened(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    source = make(tmp_path, "pytorch_model.bin")
    assert [contents.file_name for contents in read_headers(source, find_weights(source))] == ["model.safetensors"]


def test_an_adapter_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="an adapter") as caught:
        find_weights(make(tmp_path, "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"))
    assert "Merge it into its base model" in caught.value.hint


@pytest.mark.parametrize("name", ["model.gguf", "tf_model.h5", "flax_model.msgpack", "unet/model.safetensors"])
def test_weights_of_another_form_alone_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        find_weights(make(tmp_path, name, "config.json"))


def test_a_directory_without_weights_is_an_error_that_lists_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no weights") as caught:
        find_weights(make(tmp_path, "config.json", "tokenizer.json", "training_args.bin"))
    assert "model.safetensors.index.json" in caught.value.hint


OUTSIDE = [
    "/etc/passwd.safetensors",
    "../x.safetensors",
    "a/../../x.safetensors",
    "a\\x.safetensors",
    "",
    "a//x.safetensors",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_must_not_name_a_file_outside_the_directory(shard: str, tmp_path: Path) -> None:
    (tmp_path.parent / "x.safetensors").write_bytes(b"outside")
    write_index(tmp_path, {"w": shard})
    with pytest.raises(IndexFileError, match=r"model\.safetensors\.index\.json names"):
        find_weights(DirectorySource(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ('{"a":' * 100_000, "nests more than"),
        ('{"metadata": {"a": ' + "[" * 200 + "]" * 200 + '}, "weight_map": {"w": "a.safetensors"}}', "nests more than"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": []}', "does not map tensors to files"),
        ('{"weight_map": {}}', "does not map tensors to files"),
        ('{"weight_map": {"w": 3}}', "'w' is mapped to 3"),
        ('{"weight_map": {"w": null}}', "'w' is mapped to None"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "names 'w' twice"),
        ('{"metadata": 1, "weight_map": {"w": "a.safetensors"}}', "metadata is 1"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "'gone.safetensors', which is missing"),
        ('{"weight_map": {"w": "config.json"}}', r"'config.json', which is not a .safetensors file"),
    ],
)
def test_a_bad_index_is_refused(text: str, words: str, tmp_path: Path) -> None:
    make(tmp_path, "a.safetensors", "b.safetensors", "config.json")
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(IndexFileError, match=words) as caught:
        find_weights(DirectorySource(tmp_path))
    assert INDEX in str(caught.value)


def test_an_index_without_metadata_is_an_index(tmp_path: Path) -> None:
    make(tmp_path, "a.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert find_weights(DirectorySource(tmp_path)).index_metadata == {}


def test_headers_are_in_the_order_of_the_shards(tmp_path: Path) -> None:
    source = sharded(tmp_path)
    weights = find_weights(source)
    shards = read_headers(source, weights)
    assert tuple(contents.file_name for contents in shards) == weights.shards
    assert [contents.tensors[0].spec.name for contents in shards] == ["h.0.weight", "h.1.weight"]


def test_pickled_shards_are_read_through_their_index(tmp_path: Path) -> None:
    for i in range(12):
        torch.save({f"h.{i}.weight": torch.ones(2, 2)}, tmp_path / f"pytorch_model-{i:05}.bin")
    write_index(
        tmp_path, {f"h.{i}.weight": f"pytorch_model-{i:05}.bin" for i in range(12)}, "pytorch_model.bin.index.json"
    )
    source = DirectorySource(tmp_path)
    shards = read_headers(source, find_weights(source))
    assert [contents.tensors[0].spec.name for contents in shards] == [f"h.{i}.weight" for i in range(12)]


def test_a_tensor_that_the_index_does_not_list_is_kept(tmp_path: Path) -> None:
    sharded(tmp_path)
    extra = {"h.0.weight": torch.ones(2, 2), "h.0.bias": torch.ones(2)}
    save_file(extra, tmp_path / "model_00001-of-00002.safetensors")
    source = DirectorySource(tmp_path)
    contents = read_headers(source, find_weights(source))[0]
    assert {tensor.spec.name for tensor in contents.tensors} == set(extra)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"other": torch.ones(1)}, r"model_00001.* does not contain the tensor 'h\.0\.weight'; no shard has it"),
        ({"h.0.weight": torch.ones(1), "h.1.weight": torch.ones(1)}, r"'h\.1\.weight' is in two shards, model_00001"),
    ],
)
def test_shards_are_checked_against_the_index(held: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file(held, tmp_path / "model_00001-of-00002.safetensors")
    source = DirectorySource(tmp_path)
    with pytest.raises(IndexFileError, match=words):
        read_headers(source, find_weights(source))


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    source = sharded(tmp_path)
    write_index(tmp_path, {"h.0.weight": "model_00002-of-00002.safetensors", "x": "model_00001-of-00002.safetensors"})
    with pytest.raises(IndexFileError, match=r"'h\.0\.weight'; it is in model_00001"):
        read_headers(source, find_weights(source))


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"\x80\x04N.", UnsafePickleError), (b"PK\x03\x04", CorruptShardError), (b"", CorruptShardError)],
)
def test_a_broken_shard_is_named(content: bytes, error: type[Int8cliError], tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    source = DirectorySource(tmp_path)
    with pytest.raises(error, match=r"pytorch_model\.bin"):
        read_headers(source, find_weights(source))
