"""config.json may contain anything. Only what a plan needs is checked."""

import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from int8cli.checkpoint.config_file import read_config
from int8cli.checkpoint.directory import DirectorySource
from int8cli.errors import CheckpointError, Int8cliError
from int8cli.estimate.estimate import estimate_memory
from int8cli.estimate.kv_cache import read_kv_cache
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import survey_source

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}
STRANGE: tuple[Any, ...] = (5, -1, 1.5, True, "x", [], [5], [None], [["a"]], {}, {"a": 1}, 10**400, float("nan"), 2**62)


def source_with(config: str, directory: Path) -> DirectorySource:
    (directory / "config.json").write_text(config)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(16, 16)}, directory / "model.safetensors")
    return DirectorySource(directory)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", 5, "architectures is 5, not a list"),
        ("architectures", True, "architectures is True, not a list"),
        ("architectures", "LlamaForCausalLM", "architectures is 'LlamaForCausalLM', not a list"),
        ("architectures", [5], r"architectures\[0\] is 5, not str"),
        ("architectures", [None], r"architectures\[0\] is None, not str"),
        ("architectures", [["a"]], r"architectures\[0\] is \['a'\], not str"),
        ("model_type", ["llama"], r"model_type is \['llama'\], not str"),
        ("model_type", {"a": 1}, r"model_type is \{'a': 1\}, not str"),
        ("text_config", {"model_type": 5}, r"text_config\.model_type is 5, not str"),
        ("num_hidden_layers", 10**7, "num_hidden_layers is 10000000; no model has more than 10,000 layers"),
        ("vision_config", {"depth": 10**9}, r"vision_config\.depth is 1000000000; no model has more"),
    ],
)
def test_a_field_of_another_type_is_named(field: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        survey_source(source_with(json.dumps({**LLAMA, field: value}), tmp_path), PlanOptions())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "not an object"),
        ('{"a": ' * 100_000, "nests more than"),
        ('{"text_config": ' * 900 + "{}" + "}" * 900, "nests more than"),
    ],
)
def test_an_invalid_config_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(source_with(text, tmp_path))


def test_everything_that_transformers_accepts_is_accepted(tmp_path: Path) -> None:
    """Mamba's time_step_limit contains Infinity. The last of repeated keys wins."""
    source = source_with('{"time_step_limit": [0.0, Infinity], "architectures": null, "a": 1, "a": 2}', tmp_path)
    assert read_config(source) == {"time_step_limit": [0.0, float("inf")], "architectures": None, "a": 2}


def test_no_more_is_requested_than_the_file_contains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of a gigabyte from a file of a few bytes sets a gigabyte aside."""
    asked: list[int] = []

    class Watched:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def read(self, count: int = -1) -> bytes:
            asked.append(count)
            return self._file.read(count)

    source = source_with(json.dumps(LLAMA), tmp_path)
    opened = source.open
    monkeypatch.setattr(source, "open", lambda name: Watched(opened(name)))
    read_config(source)
    assert asked == [len(json.dumps(LLAMA))]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: f"{value!r:.10}")
@pytest.mark.parametrize("model_type", ["llama", "jamba", "bamba", "lfm2", "mpt", "qwen2", "gemma3_text", "mamba2"])
def test_a_memory_estimate_ends_for_any_numbers_in_the_config(
    model_type: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8cli.estimate.asking._ask", lambda config: "not asked")  # seconds for each of hundreds
    fields = ("hidden_size", "num_hidden_layers", "attn_layer_offset", "attn_layer_indices", "full_attn_idxs")
    more = ("attn_config", "max_window_layers", "partial_rotary_factor", "rope_parameters", "sliding_window")
    for field in (*fields, *more):
        config = {**LLAMA, "model_type": model_type, field: value}
        try:
            source = source_with(json.dumps(config), tmp_path)
            estimate_memory(source, survey_source(source, PlanOptions()), tmp_path / "out", threads=1)
            read_kv_cache(config)
        except Int8cliError as error:
            assert field in str(error)  # noqa: PT017
