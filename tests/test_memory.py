"""The memory estimate, compared with what transformers and bitsandbytes allocate and what convert writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import LISTED, OTHERS, WITHOUT_COLUMNS, build_tiny, read_json, save_by_hand, survey
from support.program import llama

from int8cli import convert
from int8cli.checkpoint.directory import DirectorySource
from int8cli.estimate.cards import card_named
from int8cli.estimate.estimate import FLOAT16, INT8, Estimate, Use, estimate_memory, int8_workspace
from int8cli.estimate.fit import answer, fit_table
from int8cli.estimate.units import BLOCKS, DECODER, EMBEDDINGS, ENCODER, EXPERTS, HEAD, cached_units
from int8cli.estimate.weights import Weights
from int8cli.loaders.transformers_versions import SURVEYED, float32_of, release
from int8cli.planning.plan import model_types

# Those that every change is tried on, and others that are laid out in their own way.
LOADED = {
    **LISTED,
    **{name: OTHERS[name] for name in ("gemma3", "gpt_bigcode", "codegen", "jamba", "mamba2", "modernbert", "albert")},
}


def estimate(directory: Path) -> Estimate:
    return estimate_memory(DirectorySource(directory), survey(directory), directory / "output", threads=4)


# Bytes of the tables that are not weights: the most that transformers 5.0.0, 5.23.0 and 5.24.0 were seen to make.
TABLES = {
    "albert": 1024,
    "bart": 0,
    "bert": 1024,
    "bloom": 0,
    "codegen": 2048,
    "deberta-v2": 512,
    "deepseek_v3": 32,
    "falcon": 32,
    "gemma2": 34,
    "gemma3": 34,
    "gpt2": 8192,
    "gpt_bigcode": 4096,
    "gpt_neo": 8192,
    "gpt_neox": 8,
    "gptj": 2048,
    "jamba": 0,
    "llama": 32,
    "llama-biased": 32,
    "llama-tied": 32,
    "mamba": 0,
    "mamba2": 0,
    "mistral": 32,
    "mixtral": 32,
    "modernbert": 64,
    "mpt": 0,
    "opt": 0,
    "opt-projected": 0,
    "phi3": 32,
    "qwen2": 32,
    "qwen3": 32,
    "qwen3_moe": 32,
    "roberta": 1024,
    "t5": 0,
    "t5-gated": 0,
    "vit": 0,
    "whisper": 0,
}


def table_bytes(model: Any) -> int:
    """The size of tables that the loader creates: buffers that are not in the checkpoint, with shared ones once."""
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in saved)


def weight_bytes(model: Any) -> int:
    """Parameters, saved buffers, and the scales that bitsandbytes keeps beside its weights; shared ones once.

    What a later version than this one holds in float32 counts so, and what only 5.0.0 does as 16 bit.
    """
    scales = (parameter.SCB for parameter in model.parameters() if getattr(parameter, "SCB", None) is not None)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *scales)) - table_bytes(model)
    config, version = model.config.to_dict(), release(transformers.__version__)
    later = [fact for fact in float32_of(model_types(config)) if release(fact.since) > version]
    widened = (
        parameter.numel() * 4 - parameter.nbytes
        for name, parameter in model.named_parameters()
        if any(fact.covers(name.rpartition(".")[0]) for fact in later)
    )
    earlier = (
        parameter.nbytes // 2
        for name, parameter in model.named_parameters()
        if version < release("5.23.0") and name.endswith(("mixer.A_log", "mixer.D")) and parameter.element_size() == 4
    )
    return held + sum(widened) - sum(earlier)


@pytest.mark.parametrize("name", LOADED)
def test_the_estimate_equals_what_transformers_and_bitsandbytes_use(name: str, tmp_path: Path) -> None:
    if name == "mamba" and release(transformers.__version__) < release("5.23.0"):
        pytest.skip("transformers 5.0.0 does not tie Mamba's head by default")
    source, output = tmp_path / "source", tmp_path / "output"
    build_tiny(LOADED[name], torch.float16).save_pretrained(source)
    convert(source, output, WITHOUT_COLUMNS)
    found = estimate(source)
    model_class = getattr(transformers, LOADED[name].model)
    in_float16 = model_class.from_pretrained(source, dtype=torch.float16)
    in_int8 = model_class.from_pretrained(output)
    assert found.weights.float16_bytes == weight_bytes(in_float16)
    assert found.weights.int8_bytes == weight_bytes(in_int8)
    assert found.buffer_bytes == TABLES[name]
    if transformers.__version__ in SURVEYED:  # of others nothing is promised
        assert table_bytes(in_float16) <= found.buffer_bytes
        assert table_bytes(in_int8) <= found.buffer_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantized_weights_are_loaded_in_their_dtype_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    source, output = llama(tmp_path / "source", dtype=dtype), tmp_path / "output"
    convert(source, output, WITHOUT_COLUMNS)
    loaded = transformers.LlamaForCausalLM.from_pretrained(output, dtype=torch.float16)
    found = estimate(source)
    assert found.weights.int8_bytes == weight_bytes(loaded)


def test_the_output_size_is_predicted_exactly(tmp_path: Path) -> None:
    source, output = llama(tmp_path / "source"), tmp_path / "output"
    found = estimate(source)
    convert(source, output, WITHOUT_COLUMNS)
    files = sorted(output.glob("*.safetensors"))
    assert found.conversion.output_bytes == sum(file.stat().st_size for file in files)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    marks = len(found.survey.plan.quantized)  # one byte of weight_format each, which memory does not hold
    assert found.weights.int8_bytes == found.conversion.output_bytes - headers - marks


def test_parameters_and_plain_precisions_are_those_of_the_model(tmp_path: Path) -> None:
    model = build_tiny(LISTED["llama-tied"])
    model.save_pretrained(tmp_path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = estimate(tmp_path).weights
    assert (weights.parameters, weights.float32_bytes, weights.float16_bytes) == (
        parameters,
        4 * parameters,
        2 * parameters,
    )


def test_a_tied_head_in_the_file_counts_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    tied, both = tmp_path / "tied", tmp_path / "both"
    model = build_tiny(LISTED["llama-tied"])
    model.save_pretrained(tied)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in tensors
    save_by_hand(both, tensors, read_json(tied / "config.json"))
    once, twice = estimate(tied), estimate(both)
    assert twice.not_in_memory == {"lm_head.weight"}
    assert twice.weights.float16_bytes == once.weights.float16_bytes
    assert twice.weights.int8_bytes == once.weights.int8_bytes
    assert twice.weights.parameters == once.weights.parameters
    assert twice.weights.stored_bytes - once.weights.stored_bytes == tensors["lm_head.weight"].nbytes


def test_names_of_one_storage_in_a_bin_count_once(tmp_path: Path) -> None:
    shared = torch.ones(99, 32)
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    torch.save(dict.fromkeys(names, shared), tmp_path / "pytorch_model.bin")
    weights = estimate(tmp_path).weights
    assert weights.parameters == shared.numel()
    assert weights.float16_bytes == 2 * shared.numel()


def test_masks_and_frequencies_of_older_versions_are_not_counted_in_memory(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.c_attn.bias": torch.ones(96),
    }
    found = estimate(save_by_hand(tmp_path, tensors))
    assert found.weights.parameters == 96
    assert found.not_in_memory == set(tensors) - {"h.0.attn.c_attn.bias"}


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "bert", "mixtral", "qwen3_moe", "mamba", "gpt2", "vit"])
def test_parts_and_units_both_add_up_to_the_whole(name: str, tmp_path: Path) -> None:
    build_tiny(LISTED[name]).save_pretrained(tmp_path)
    found = estimate(tmp_path)
    assert Weights.total(part.weights for part in found.parts) == found.weights
    assert found.weights.stored_bytes == sum(decision.spec.nbytes for decision in found.survey.plan.decisions)
    assert sum(unit.is_block for unit, _ in found.units) == (4 if name in ("t5", "bart") else 2)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama", [EMBEDDINGS, BLOCKS, "other", HEAD]),
        ("llama-tied", [EMBEDDINGS, BLOCKS, "other"]),
        ("bloom", [EMBEDDINGS, BLOCKS, "other"]),
        ("opt", [EMBEDDINGS, BLOCKS, "other"]),
        ("t5", [EMBEDDINGS, ENCODER, DECODER, "other"]),
        ("mixtral", [EMBEDDINGS, BLOCKS, EXPERTS, "other", HEAD]),
        ("bert", [EMBEDDINGS, BLOCKS, HEAD]),
    ],
)
def test_the_parts_of_a_model_follow_from_tensor_names(name: str, parts: list[str], tmp_path: Path) -> None:
    build_tiny(LISTED[name]).save_pretrained(tmp_path)
    assert [part.name for part in estimate(tmp_path).parts] == parts


def test_experts_are_shown_separately_from_their_blocks(tmp_path: Path) -> None:
    model = build_tiny(LISTED["mixtral"])
    model.save_pretrained(tmp_path)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    found = {part.name: part.weights for part in estimate(tmp_path).parts}
    assert found[EXPERTS].parameters == experts > 0
    assert found[EXPERTS].int8_data_bytes == 0


def test_blocks_run_by_number_and_the_head_comes_last(tmp_path: Path) -> None:
    found = estimate(llama(tmp_path, layers=12))
    assert [unit.name for unit, _ in found.units] == [
        "embeddings",
        *(f"model.layers.{index}" for index in range(12)),
        "other",
        "head",
    ]


def test_the_largest_block_is_found(tmp_path: Path) -> None:
    shapes = {"h.0.fc.weight": (8, 8), "h.1.fc.weight": (8, 32), "h.2.fc.weight": (8, 16)}
    found = estimate(save_by_hand(tmp_path, {name: torch.ones(shape) for name, shape in shapes.items()}))
    assert found.largest_block is not None
    assert found.largest_block[0].name == "h.1"


def test_the_cache_belongs_to_the_blocks(tmp_path: Path) -> None:
    found = estimate(llama(tmp_path))
    use = Use(context=10, batch=3)
    a_layer = 3 * 10 * 2 * 64 * 2
    assert [load.kv_bytes for load in found.loads(INT8, use)] == [0, a_layer, a_layer, 0, 0]
    assert sum(load.kv_bytes for load in found.loads(FLOAT16, use)) == found.kv_bytes(use)


def test_the_cache_of_an_encoder_decoder_belongs_to_the_decoder(tmp_path: Path) -> None:
    build_tiny(LISTED["t5"]).save_pretrained(tmp_path)
    found = estimate(tmp_path)
    loads = {load.name: load.kv_bytes for load in found.loads(INT8, Use(10))}
    assert [name for name, size in loads.items() if size] == ["decoder.block.0", "decoder.block.1"]
    assert sum(loads.values()) == found.kv_bytes(Use(10))


def test_blocks_that_are_used_several_times_hold_the_cache_of_each_time(tmp_path: Path) -> None:
    found = estimate(llama(tmp_path, layers=2))
    units = [unit for unit, _ in found.units]
    assert [name for name, _ in cached_units(units, 4)] == [f"model.layers.{index}" for index in (0, 0, 1, 1)]
    assert [name for name, _ in cached_units(units, 1)] == ["model.layers.0"]


def test_loads_add_up_to_all_weights(tmp_path: Path) -> None:
    build_tiny(LISTED["gpt_neo"]).save_pretrained(tmp_path)
    found = estimate(tmp_path)
    assert found.buffer_bytes == 2 * 64 * 64
    whole = sum(load.weight_bytes for load in found.loads(INT8, None))
    assert whole == found.weights.int8_bytes + found.buffer_bytes


def test_the_workspace_is_that_of_the_largest_product() -> None:
    tokens, width = 2048, 14336
    expected = tokens * (width + 6 * 4 * width + 4) + 2 * 15 * (tokens + 4 * width)
    assert int8_workspace(4 * width, width, tokens) == expected


def test_an_unknown_cache_leaves_memory_in_use_unknown(tmp_path: Path) -> None:
    directory = save_by_hand(tmp_path, {"layers.0.fc.weight": torch.ones(8, 8), "layers.0.fc.bias": torch.ones(8)})
    found, use = estimate(directory), Use(10)
    assert found.kv_bytes(use) is None
    row = fit_table(found, use, [card_named("RTX 3090")])[0]
    assert (row.counts[INT8].weights, row.counts[INT8].in_use) == (1, None)
    given = answer(found, use, [card_named("RTX 3090")], INT8)
    assert (given.fits, given.holds_weights, given.largest_context) == (True, True, None)


def test_the_largest_context_is_the_last_that_fits(tmp_path: Path) -> None:
    found = estimate(llama(tmp_path, layers=4, hidden=256, intermediate=512))
    cards = [card_named("RTX 3060")]
    given = answer(found, Use(context=10**8), cards, INT8)
    assert given.holds_weights
    assert not given.fits
    assert given.largest_context
    assert answer(found, Use(given.largest_context), cards, INT8).fits
    assert not answer(found, Use(given.largest_context + 1), cards, INT8).fits
    assert given.placement.fits


def test_a_local_model_is_not_downloaded(tmp_path: Path) -> None:
    found = estimate(llama(tmp_path)).conversion
    assert found.download_bytes == 0
    assert found.disk_bytes == found.disk_keeping_source_bytes
    assert 0 < found.disk_bytes - found.output_bytes < 100_000  # records, report, index
