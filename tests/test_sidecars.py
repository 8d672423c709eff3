"""The second file of a pass: the source's columns, bit for bit. Shards are the same with and without it."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    LISTED,
    WITHOUT_COLUMNS,
    convert_storing,
    in_features_of,
    read_all,
    read_json,
    read_tensors,
    save_by_hand,
    save_tiny,
    some_columns,
    stored_at,
    survey,
)
from support.program import Nursery, llama, tree, wait_until

from int8cli import ConvertOptions, convert
from int8cli.commands.options import LayoutName
from int8cli.planning.blocks import BLOCK_ELEMENTS
from int8cli.planning.decisions import Decision
from int8cli.results.stored_columns import StoredColumns

UP = "layers.0.mlp.up_proj.weight"
DOWN = "layers.0.mlp.down_proj.weight"
CONV1D = "h.0.mlp.c_fc.weight"
SHARD = "model-00002-of-00003.safetensors"


def sidecars(output: Path) -> dict[str, torch.Tensor]:
    return read_all(output / "int8" / "outliers")


def loaders_files(output: Path) -> dict[str, bytes]:
    """The files that loaders see: all except our own directory and the model card."""
    return {name: data for name, data in tree(output).items() if not name.startswith("int8/") and name != "README.md"}


def assert_holds_the_sources_columns(source: Path, output: Path) -> None:
    """Every quantized tensor has its entry, which holds exactly the columns asked for; and there are no others."""
    originals, stored = read_all(source), sidecars(output)
    quantized = survey(source).plan.quantized
    assert quantized
    for decision in quantized:
        indices = some_columns(decision).indices
        weight = originals[decision.spec.name].t() if decision.transpose else originals[decision.spec.name]
        held = stored.pop(f"{decision.module}.outlier_cols")
        assert held.dtype == torch.int32
        assert tuple(held.tolist()) == indices
        columns = stored.pop(f"{decision.module}.outlier_weight")
        assert columns.dtype == weight.dtype
        assert torch.equal(columns, weight[:, list(indices)])
    assert stored == {}


# What they hold


@pytest.mark.parametrize("architecture", [name for name in LISTED if name != "falcon"])  # has nothing to quantize
def test_columns_are_the_sources_and_loaders_see_no_difference(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    convert(source, tmp_path / "none", WITHOUT_COLUMNS)
    report = convert_storing(source, tmp_path / "out", some_columns).report
    assert_holds_the_sources_columns(source, tmp_path / "out")
    assert loaders_files(tmp_path / "out") == loaders_files(tmp_path / "none")
    found = survey(source)
    planned = replace(found, stored_counts={e.spec.name: len(some_columns(e).columns) for e in found.plan.quantized})
    written = [path.stat().st_size for path in (tmp_path / "out/int8/outliers").iterdir()]
    assert planned.sidecar_bytes == report.sidecar_bytes == sum(written)
    assert planned.output_bytes == report.output_bytes


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "bart", "bert"])
def test_transformers_loads_it_with_nothing_unexpected(architecture: str, tmp_path: Path) -> None:
    import transformers

    source = save_tiny(architecture, tmp_path / "source")
    convert_storing(source, tmp_path / "out", some_columns)
    model_class = getattr(transformers, LISTED[architecture].model)
    _, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_shards_of_any_dtype_and_layout(layout: LayoutName, dtype: torch.dtype, tmp_path: Path) -> None:
    source = llama(tmp_path / "source", dtype=dtype)
    convert_storing(source, tmp_path / "out", some_columns, ConvertOptions(outliers="none", layout=layout))
    assert_holds_the_sources_columns(source, tmp_path / "out")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert [path.name for path in sorted((tmp_path / "out/int8/outliers").iterdir())] == names
    for name in names:  # beside the shard that holds the layer
        layers = {
            tensor.removesuffix(".outlier_cols") for tensor in read_tensors(tmp_path / "out/int8/outliers" / name)
        }
        layers = {layer for layer in layers if not layer.endswith(".outlier_weight")}
        assert {f"{layer}.weight" for layer in layers} <= set(read_tensors(tmp_path / "out" / name))


def test_a_bin_with_transposed_weights(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1)
    tensors = read_tensors(source / "model.safetensors")
    crosswise = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    torch.save(crosswise, source / "pytorch_model.bin")
    convert_storing(source, tmp_path / "out", some_columns)
    (source / "pytorch_model.bin").unlink()
    assert_holds_the_sources_columns(source, tmp_path / "out")


def test_columns_at_the_borders_of_a_divided_row(tmp_path: Path) -> None:
    indices = (0, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 8)
    weight = torch.randn(3, 2 * BLOCK_ELEMENTS + 9).bfloat16()
    source = save_by_hand(tmp_path / "source", {UP: weight})
    convert_storing(
        source,
        tmp_path / "out",
        lambda decision: stored_at(decision, *indices),
        ConvertOptions(outliers="none", threads=3),
    )
    assert torch.equal(sidecars(tmp_path / "out")[UP.replace("weight", "outlier_weight")], weight[:, list(indices)])


def test_a_layer_with_no_column_worth_storing_has_an_empty_entry(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {UP: torch.randn(8, 16).half(), DOWN: torch.randn(16, 8).half()})

    def chosen(decision: Decision) -> StoredColumns | None:
        return some_columns(decision) if decision.spec.name == UP else None

    convert_storing(source, tmp_path / "out", chosen)
    stored = {name: (str(t.dtype), tuple(t.shape)) for name, t in sidecars(tmp_path / "out").items()}
    assert stored == {
        "layers.0.mlp.up_proj.outlier_cols": ("torch.int32", (3,)),
        "layers.0.mlp.up_proj.outlier_weight": ("torch.float16", (8, 3)),
        "layers.0.mlp.down_proj.outlier_cols": ("torch.int32", (0,)),
        "layers.0.mlp.down_proj.outlier_weight": ("torch.float16", (16, 0)),
    }


def test_every_column_may_be_stored(tmp_path: Path) -> None:
    weight = torch.randn(8, 16).bfloat16()
    source = save_by_hand(tmp_path / "source", {UP: weight})
    convert_storing(source, tmp_path / "out", lambda e: stored_at(e, *range(in_features_of(e))))
    assert torch.equal(sidecars(tmp_path / "out")[UP.replace("weight", "outlier_weight")], weight)


def test_a_shard_without_linears_has_no_sidecar(tmp_path: Path) -> None:
    source = save_by_hand(
        tmp_path / "source", {"embed_tokens.weight": torch.randn(8, 16).half(), UP: torch.randn(8, 16).half()}
    )
    report = convert_storing(
        source, tmp_path / "out", some_columns, ConvertOptions(outliers="none", skip=("*up_proj",))
    ).report
    assert report.sidecar_bytes == 0
    assert not (tmp_path / "out/int8/outliers").exists()


# Processes, threads and devices


def test_threads_and_processes_change_no_byte(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    source = save_by_hand(
        tmp_path / "source",
        {
            UP: torch.randn(1501, 1500, generator=generator).bfloat16(),
            CONV1D: torch.randn(1500, 1501, generator=generator).bfloat16(),
            "layers.1.mlp.up_proj.weight": torch.randn(3, BLOCK_ELEMENTS + 9, generator=generator).bfloat16(),
        },
    )
    for threads in (1, 3):
        convert_storing(source, tmp_path / str(threads), some_columns, ConvertOptions(outliers="none", threads=threads))
    assert_holds_the_sources_columns(source, tmp_path / "1")
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A model and, beside it in `out`, its conversion with columns by the weights, in a run that nobody broke."""
    root = tmp_path_factory.mktemp("converted")
    llama(root / "model")
    outcome = nursery.run("convert", "model", "-o", "out", "--outliers", "weights", cwd=root)
    assert outcome.code == 0, outcome.err
    return root


@pytest.mark.parametrize(
    "moment",
    [
        f"int8/partial/{SHARD}.outliers",
        f"int8/outliers/{SHARD}",
        SHARD,
        f"int8/records/{SHARD.replace('safetensors', 'json')}",
        "int8/report.json",
    ],
)
def test_a_killed_run_resumes_and_writes_the_same_bytes(
    moment: str, converted: Path, nursery: Nursery, tmp_path: Path
) -> None:
    whole = tree(converted / "out")
    command = ("convert", converted / "model", "-o", tmp_path / "out", "--outliers", "weights")
    child = nursery.start(*command, cwd=converted)
    wait_until(lambda: (tmp_path / "out" / moment).exists() or (tmp_path / "out/config.json").exists(), moment)
    child.signal(signal.SIGKILL)
    child.wait()
    standing = {name: data for name, data in tree(tmp_path / "out").items() if name.startswith("int8/outliers/")}
    assert standing.items() <= whole.items()
    outcome = nursery.run(*command, cwd=converted)
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path / "out") == whole


def damage_sidecar(output: Path, damage: str) -> None:
    sidecar = output / "int8/outliers" / SHARD
    if damage == "gone":
        sidecar.unlink()
    else:
        sidecar.write_bytes(sidecar.read_bytes()[:-1])


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_an_incomplete_sidecar_is_made_again(damage: str, tmp_path: Path) -> None:
    source, output = llama(tmp_path / "source"), tmp_path / "out"
    convert_storing(source, output, some_columns)
    before, others = tree(output), (output / "model-00001-of-00003.safetensors").stat()
    damage_sidecar(output, damage)
    convert_storing(source, output, some_columns)
    assert tree(output) == before
    assert (output / "model-00001-of-00003.safetensors").stat() == others  # with its shard, and no other


def test_suspects_are_the_same_when_a_finished_shard_is_made_again(
    converted: Path, nursery: Nursery, tmp_path: Path
) -> None:
    command = ("convert", converted / "model", "-o", tmp_path / "out", "--outliers", "weights")
    assert nursery.run(*command, cwd=converted).code == 0
    damage_sidecar(tmp_path / "out", "gone")
    assert nursery.run(*command, cwd=converted).code == 0
    assert tree(tmp_path / "out") == tree(converted / "out")


def test_overwrite_without_columns_removes_the_sidecars(converted: Path, nursery: Nursery, tmp_path: Path) -> None:
    command = ("convert", converted / "model", "-o", tmp_path / "out")
    assert nursery.run(*command, "--outliers", "weights", cwd=converted).code == 0
    assert (tmp_path / "out/int8/outliers" / SHARD).exists()
    refused = nursery.run(*command, "--outliers", "none", cwd=converted)
    assert refused.code == 1
    assert "outliers 'weights'; this one has 'none'" in refused.err
    assert nursery.run(*command, "--outliers", "none", "--overwrite", cwd=converted).code == 0
    assert not (tmp_path / "out/int8/outliers").exists()
    assert read_json(tmp_path / "out/int8/report.json")["stored_columns"] is None
