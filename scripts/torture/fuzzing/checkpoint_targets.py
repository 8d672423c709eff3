"""What a source consists of: safetensors headers, indexes, config.json, and PyTorch's archives, pickles and old files.

safetensors and torch are the judges: what int8cli reads, they must read too, and as the same tensors.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save
from support.program import llama, llama_config

from int8cli import EstimateOptions, estimate_memory
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.pickled import load_legacy, read_pickled
from int8cli.checkpoint.state_dict_pickle import NotAStateDictError, read_state_dict
from int8cli.checkpoint.tensor import TORCH_NAMES, ShardContents
from int8cli.planning.plan import PlanOptions
from int8cli.planning.survey import survey_source
from int8cli.report.memory_json import memory_to_json
from torture.fuzzing import Run, Target, WrongResultError
from torture.fuzzing.mutations import change_bytes, change_json
from torture.header_judge import compare_with_safetensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "e": torch.zeros(0, 2)}


def _header(scratch: Path) -> tuple[list[bytes], Run]:
    seeds = [save(TENSORS, {"format": "pt"}), save({}), save({"x": torch.tensor(1, dtype=torch.int8)})]
    return seeds, compare_with_safetensors


def _change_header(random: Random, data: bytes, other: bytes) -> bytes:
    """The JSON changed and its length set right, mostly."""
    if random.random() < 0.2 or len(data) < 8:
        return change_bytes(random, data, other)
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    text = change_json(random, data[8 : 8 + length], other[8:])
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _index(scratch: Path) -> tuple[list[bytes], Run]:
    model = llama(scratch / "m", layers=1, shards=2)
    index = model / "model.safetensors.index.json"
    seed = index.read_bytes()

    def run(data: bytes) -> None:
        index.write_bytes(data)
        survey_source(DirectorySource(model), PlanOptions())

    return [seed], run


def _config(scratch: Path) -> tuple[list[bytes], Run]:
    model = llama(scratch / "m", layers=1, shards=1)

    def run(data: bytes) -> None:
        (model / "config.json").write_bytes(data)
        survey_source(DirectorySource(model), PlanOptions())
        json.dumps(memory_to_json(estimate_memory(model, EstimateOptions())))

    llama_like = llama_config(1, 64, 96, 128)
    others = (
        {"text_config": llama_like, "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 2}},
        {"sliding_window": 16, "layer_types": ["sliding_attention"], "head_dim": 16, "model_type": "gemma3_text"},
        {
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "q_lora_rank": 8,
            "n_routed_experts": 4,
            "model_type": "deepseek_v3",
        },
        {"attn_type_list": [1], "layers_block_type": ["mamba"], "mamba_d_state": 4, "model_type": "jamba"},
        {"is_encoder_decoder": True, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "model_type": "t5"},
    )
    return [json.dumps(llama_like | other).encode() for other in ({}, *others)], run


def _saved(state: dict[str, torch.Tensor], *, archive: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def _states() -> list[dict[str, torch.Tensor]]:
    base = torch.arange(12.0).reshape(3, 4)
    return [TENSORS, {"whole": base, "turned": base.t(), "part": base[1:]}, torch.nn.Linear(3, 2).state_dict()]


def _archive(scratch: Path) -> tuple[list[bytes], Run]:
    return [_saved(state) for state in _states()], _compare_with_torch


def _old_file(scratch: Path) -> tuple[list[bytes], Run]:
    """Torch itself reads the data of these: what its pickles promise must be what comes of them."""
    path = scratch / "x.bin"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_pickled(io.BytesIO(data), "x.bin", len(data))
            if _described(found) != _described_by_torch(load_legacy(path)):
                raise WrongResultError("its tensors are not those that its pickles promise")

    return [_saved(state, archive=False) for state in _states()], run


def _pickle(scratch: Path) -> tuple[list[bytes], Run]:
    """The pickle alone is changed; the archive around it stays whole, with storages as large as the pickle has them."""

    def run(data: bytes) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x/data.pkl", data)
            archive.writestr("x/version", "3\n")
            for key, size_bytes in _storages(data).items():
                archive.writestr(f"x/data/{key}", bytes(size_bytes))
        _compare_with_torch(buffer.getvalue())

    pickles = []
    for state in _states():
        with zipfile.ZipFile(io.BytesIO(_saved(state))) as archive:
            pickles.append(archive.read("archive/data.pkl"))
    return pickles, run


def _storages(pickle: bytes) -> dict[str, int]:
    sizes = {str(key): 64 for key in range(4)}
    with suppress(NotAStateDictError):
        sizes |= {tensor.storage: min(tensor.storage_bytes, 4096) for tensor in read_state_dict(pickle).values()}
    return {key: size for key, size in sizes.items() if key.isascii() and key.isalnum()}


def _compare_with_torch(data: bytes) -> None:
    """What int8cli reads, torch reads too, as the same tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_pickled(io.BytesIO(data), "x.bin", len(data))
        try:
            theirs = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:
            raise WrongResultError(f"is read, but torch refuses it: {type(error).__name__}: {error!s:.80}") from error
    if (ours := _described(found)) != _described_by_torch(theirs):
        raise WrongResultError(f"is not read as torch reads it: {str(ours)[:100]}")


def _described(contents: ShardContents) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {stored.spec.name: (TORCH_NAMES[stored.spec.dtype], stored.spec.shape) for stored in contents.tensors}


def _described_by_torch(state: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in state.items()}


_PREPARED: tuple[
    tuple[str, Callable[[Path], tuple[list[bytes], Run]], Callable[[Random, bytes, bytes], bytes]], ...
] = (
    ("header", _header, _change_header),
    ("index", _index, change_json),
    ("config", _config, change_json),
    ("pickle", _pickle, change_bytes),
    ("archive", _archive, change_bytes),
    ("old-file", _old_file, change_bytes),
)
CHECKPOINT_TARGETS = tuple(Target(*each) for each in _PREPARED)
