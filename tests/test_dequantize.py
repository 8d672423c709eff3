"""`dequantize`: the weights that load_model computes with, as floats that any loader opens."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_all, save_tiny
from support.program import llama
from support.program import run as run_program
from support.progress import CoherentProgress
from test_runtime import run, store_columns
from torch import Tensor

import int8cli
from int8cli import ConvertOptions, DequantizeOptions, convert, dequantize
from int8cli.commands.options import LayoutName
from int8cli.conversion import dequantize as dequantization
from int8cli.errors import CheckpointError, Int8cliError, OptionError, OutputError, SettingsMismatchError, SourceError
from int8cli.runtime.linear import Int8Linear


def converted(
    architecture: str, directory: Path, dtype: torch.dtype = torch.bfloat16, layout: LayoutName = "bitsandbytes"
) -> Path:
    source = save_tiny(architecture, directory / "source", dtype)
    convert(source, directory / "out", ConvertOptions(outliers="none", layout=layout))
    store_columns(source, directory / "out")
    return directory / "out"


def effective_weights(directory: Path) -> dict[str, Tensor]:
    """What each Int8Linear computes with, in float32, by the names of a model in floats."""
    model = int8cli.load_model(directory, device="cpu")
    return {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_those_that_load_model_computes_with(
    layout: LayoutName, dtype: torch.dtype, tmp_path: Path
) -> None:
    output = converted("llama-biased", tmp_path, dtype, layout)
    found = dequantize(output, tmp_path / "floats")
    source, floats = read_all(tmp_path / "source"), read_all(tmp_path / "floats")
    effective = effective_weights(output)
    assert found.restored_layers == len(effective) > 0
    assert floats.keys() == source.keys()
    for name, tensor in floats.items():
        assert (tensor.dtype, tensor.shape) == (source[name].dtype, source[name].shape)
        module = name.removesuffix(".weight")
        expected = effective[module].to(dtype) if module in effective else source[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("architecture", ["gpt2", "llama-tied", "bloom", "t5", "qwen3_moe"])
def test_every_loader_opens_it_as_the_16_bit_model_that_it_is(architecture: str, tmp_path: Path) -> None:
    output = converted(architecture, tmp_path, torch.float32)
    dequantize(output, tmp_path / "floats")
    model = int8cli.load_model(output, device="cpu")
    opened = type(model).from_pretrained(tmp_path / "floats", dtype=torch.float32)
    torch.testing.assert_close(run(opened).logits, run(model.dequantize()).logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "floats/config.json").read_text())
    assert "quantization_config" not in config


def test_blocks_smaller_than_a_tensor_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = converted("gpt2", tmp_path)
    dequantize(output, tmp_path / "whole")
    monkeypatch.setattr("int8cli.conversion.float_blocks._BLOCK_ELEMENTS", 100)
    dequantize(output, tmp_path / "blocks")
    name = "model.safetensors"
    assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_dtype_is_that_of_all_floats_and_of_the_config(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    dequantize(output, tmp_path / "floats", DequantizeOptions("float16"))
    assert {tensor.dtype for tensor in read_all(tmp_path / "floats").values()} == {torch.float16}
    config = json.loads((tmp_path / "floats/config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == "float16"
    with pytest.raises(OptionError, match="not one of float32"):
        dequantize(output, tmp_path / "other", DequantizeOptions("int8"))  # type: ignore[arg-type]


def test_a_value_beyond_float16_is_an_error_and_leaves_no_shard(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensors = read_all(source)
    tensors["model.norm.weight"][3] = 1e6
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", ConvertOptions(outliers="none"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the value 9.99e.05, which float16 cannot hold"):
        dequantize(tmp_path / "out", tmp_path / "floats", DequantizeOptions("float16"))
    assert not list((tmp_path / "floats").rglob("*.safetensors"))


def sharded(directory: Path) -> Path:
    source = llama(directory / "source", shards=4)
    return convert(source, directory / "out", ConvertOptions(outliers="weights")).output


def test_an_interrupted_run_resumes_with_the_shard_it_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = sharded(tmp_path)
    whole = dequantize(output, tmp_path / "whole")
    assert whole.shards > 2
    write, calls = dequantization._write_shard, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(dequantization, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dequantize(output, tmp_path / "floats")
    assert not (tmp_path / "floats/config.json").exists()
    progress = CoherentProgress()
    again = dequantize(output, tmp_path / "floats", progress=progress)
    assert again.shards_already_there == 2
    assert len(progress.outcomes) == whole.shards - 2
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (tmp_path / "floats" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    (tmp_path / "floats").mkdir()
    (tmp_path / "floats/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty: it holds notes\.txt"):
        dequantize(output, tmp_path / "floats")
    with pytest.raises(OutputError):
        dequantize(output, output)
    dequantize(output, tmp_path / "other")
    with pytest.raises(SettingsMismatchError, match="another dtype"):
        dequantize(output, tmp_path / "other", DequantizeOptions("float32"))
    with pytest.raises(OutputError, match="not a conversion"):
        dequantize(tmp_path / "source", tmp_path / "third")


def test_the_result_converts_again_to_the_same_int8(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", torch.float32)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none"))
    dequantize(tmp_path / "out", tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "again", ConvertOptions(outliers="none"))
    first, second = read_all(tmp_path / "out"), read_all(tmp_path / "again")
    for name, tensor in first.items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, second[name])


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    converted("llama", tmp_path)
    outcome = run_program("dequantize", "out", "-o", "floats", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["schema"] == "int8cli.dequantized/1"
    assert document["dtypes"] == ["bfloat16"]
    assert document["output_bytes"] == (tmp_path / "floats/model.safetensors").stat().st_size
    again = run_program("dequantize", "out", "-o", "floats", cwd=tmp_path)
    assert (again.code, again.out.splitlines()[0]) == (0, "out → floats")


def _lose_a_tensor(record: dict[str, Any]) -> None:
    record["source_tensors"].pop()


def _add_a_tensor(record: dict[str, Any]) -> None:
    record["source_tensors"].append({"name": "another", "dtype": "F32", "shape": [2]})


def _name_another_dtype(record: dict[str, Any]) -> None:
    for tensor in record["source_tensors"]:
        tensor["dtype"] = "F8_E4M3"


def _name_another_shard(record: dict[str, Any]) -> None:
    record["source"]["output"] = "other.safetensors"


def _name_another_sidecar(record: dict[str, Any]) -> None:
    record["files"].append({**record["files"][0], "file": "int8/outliers/more.safetensors"})


@pytest.mark.parametrize(
    "change", [_lose_a_tensor, _add_a_tensor, _name_another_dtype, _name_another_shard, _name_another_sidecar]
)
def test_records_that_are_not_those_of_the_files_lose_nothing_silently(change: Any, tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    path = output / "int8/records/model.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(Int8cliError) as caught:
        dequantize(output, tmp_path / "floats")
    assert caught.value.hint
    assert not (tmp_path / "floats/model.safetensors").exists()


def test_a_shard_without_a_record_is_not_left_out(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    path = output / "int8/conversion.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shards": []}))
    with pytest.raises(CheckpointError, match="has no record"):
        dequantize(output, tmp_path / "floats")


def test_a_pipe_in_place_of_a_record_is_an_error(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    for name in ("int8/records/model.json", "int8/conversion.json"):
        (output / name).unlink()
        os.mkfifo(output / name)
        with pytest.raises(OutputError, match="not a regular file"):
            dequantize(output, tmp_path / "floats")


def test_our_own_directory_is_no_place_for_a_model(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    with pytest.raises(OutputError, match="is inside"):
        dequantize(output, output / "int8/floats")


def test_a_link_to_a_file_outside_is_not_copied(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    (tmp_path / "secret").write_text("{}")
    (output / "tokenizer_config.json").unlink(missing_ok=True)
    (output / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"tokenizer_config\.json is a link to .*secret, outside"):
        dequantize(output, tmp_path / "floats")


def test_an_output_that_is_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    (tmp_path / "floats").symlink_to("floats")
    with pytest.raises(OutputError, match="Too many levels"):
        dequantize(output, tmp_path / "floats")


def test_a_run_killed_before_it_claimed_the_directory_is_resumed(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    (tmp_path / "floats/int8").mkdir(parents=True)
    (tmp_path / "floats/int8/.dequantization.json.partial").write_text("{")
    assert dequantize(output, tmp_path / "floats").shards == 1
    assert not (tmp_path / "floats/int8/.dequantization.json.partial").exists()
