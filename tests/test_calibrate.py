"""A model that runs block by block: the same numbers, one block in memory, and the statistics."""

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibration_models import calibrated, make_model, save_tokenizer, some_text
from support.checkpoints import HEADS, LISTED, OTHERS, build_tiny

from int8cli.checkpoint.locate import open_source
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.checkpoint.weight_files import find_weights, read_headers
from int8cli.errors import (
    CannotRunError,
    CheckpointError,
    NonFiniteError,
    NotEnoughMemoryError,
    OutputInUseError,
    SavedStateError,
    TextError,
)
from int8cli.llm_int8.inputs import InputStatistics
from int8cli.model.skeleton import build_skeleton
from int8cli.model.strands import Strand
from int8cli.model.stream import StreamedModel
from int8cli.model.text import Text
from int8cli.outliers import calibrate as calibrate_module
from int8cli.outliers.statistics import RESIDUAL, OutlierStatistics
from int8cli.outliers.statistics_file import load_statistics, save_statistics
from int8cli.progress import SilentProgress

ALL = LISTED | HEADS | OTHERS
FAMILIES = [
    *("bloom", "opt", "opt-projected", "gpt2", "gpt_neox", "gptj", "llama", "llama-tied", "qwen2", "gemma2", "phi3"),
    *("mpt", "falcon", "olmoe", "bert", "roberta", "deberta-v2", "albert", "modernbert", "t5", "bart", "marian"),
]


def token_batches(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Sequences of several lengths, with a decoder's side where there is one."""
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 90, (1, length), generator=generator)} for length in (12, 7, 12)]
    if model.config.is_encoder_decoder:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)} for batch in batches]
    return batches


class Streamed:
    """A checkpoint opened for a streamed run, counting the reads of each tensor."""

    def __init__(self, directory: Path) -> None:
        self.source = open_source(str(directory), revision=None, download_dir=directory / "incoming")
        self.tensors = CheckpointTensors(self.source, read_headers(self.source, find_weights(self.source)))
        self.skeleton = build_skeleton(directory, self.tensors.specs)
        self.reads: Counter[str] = Counter()
        for name in ("read", "map"):
            setattr(self.tensors, name, self._counting(getattr(self.tensors, name)))

    def _counting(self, read):
        def counted(name: str) -> torch.Tensor:
            self.reads[name] += 1
            return read(name)

        return counted


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_whole_model_to_the_bit(tmp_path: Path, family: str) -> None:
    model = build_tiny(ALL[family])
    model.save_pretrained(tmp_path)
    whole = type(model).from_pretrained(tmp_path, dtype="auto").eval()
    opened = Streamed(tmp_path)
    stream = StreamedModel(opened.skeleton, opened.tensors, to_head=False)
    batches = token_batches(model)
    for unit in stream.units(batches):
        unit.run()
    for index, batch in enumerate(batches):
        with torch.no_grad():
            expected = whole(**batch)[0]
        assert torch.equal(stream.outputs[index][0], expected)


def test_bin_shards_and_t5_in_float16_are_run_alike(tmp_path: Path) -> None:
    model = build_tiny(ALL["t5"], torch.float16)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    whole = type(model).from_pretrained(tmp_path, dtype="auto").eval()
    assert whole.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    opened = Streamed(tmp_path)
    stream = StreamedModel(opened.skeleton, opened.tensors, to_head=False)
    [batch, *_] = token_batches(model)
    for unit in stream.units([batch]):
        unit.run()
    with torch.no_grad():
        assert torch.equal(stream.outputs[0][0], whole(**batch)[0])


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_one_block_is_in_memory_and_each_weight_is_read_once(tmp_path: Path, family: str) -> None:
    model = build_tiny(ALL[family])
    model.save_pretrained(tmp_path)
    opened = Streamed(tmp_path)
    stream = StreamedModel(opened.skeleton, opened.tensors)
    blocks = [unit.name for unit in opened.skeleton.units if unit.is_block]
    seen = []
    for unit in stream.units(token_batches(model)):
        present = {name for name, weight in opened.skeleton.model.named_parameters() if not weight.is_meta}
        held = {block for block in blocks for name in present if name.startswith(f"{block}.")}
        assert held == ({unit.unit.name} if unit.unit.is_block else set())
        seen.append(unit.unit.name)
        unit.run()
    assert [name for name in seen if name in blocks] == blocks
    assert set(opened.reads.values()) == {1}
    assert not [name for name, weight in opened.skeleton.model.named_parameters() if not weight.is_meta]


def test_the_head_is_neither_read_nor_run(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    opened = Streamed(tmp_path)
    stream = StreamedModel(opened.skeleton, opened.tensors)
    for unit in stream.units(token_batches(opened.skeleton.model)):
        unit.run()
    assert stream.outputs == {}
    assert opened.reads["lm_head.weight"] == 0


SITES = {
    "llama": [
        ("norm-fed", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("attention output", ("self_attn.o_proj",)),
        ("norm-fed", ("mlp.gate_proj", "mlp.up_proj")),
        ("second feed-forward", ("mlp.down_proj",)),
    ],
    "gpt2": [
        ("norm-fed", ("attn.c_attn",)),
        ("attention output", ("attn.c_proj",)),
        ("norm-fed", ("mlp.c_fc",)),
        ("second feed-forward", ("mlp.c_proj",)),
    ],
    "gptj": [
        ("norm-fed", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        ("attention output", ("attn.out_proj",)),
        ("second feed-forward", ("mlp.fc_out",)),
    ],
    "falcon": [
        ("norm-fed", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ("attention output", ("self_attention.dense",)),
        ("second feed-forward", ("mlp.dense_4h_to_h",)),
    ],
    "bert": [
        ("norm-fed", ("attention.self.query", "attention.self.key", "attention.self.value")),
        ("attention output", ("attention.output.dense",)),
        ("norm-fed", ("intermediate.dense",)),
        ("second feed-forward", ("output.dense",)),
    ],
    "bart": [
        ("norm-fed", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("attention output", ("self_attn.out_proj",)),
        ("norm-fed", ("encoder_attn.q_proj",)),
        ("norm-fed", ("encoder_attn.k_proj", "encoder_attn.v_proj")),  # what the encoder's last norm made
        ("attention output", ("encoder_attn.out_proj",)),
        ("norm-fed", ("fc1",)),
        ("second feed-forward", ("fc2",)),
    ],
}


@pytest.mark.parametrize("family", SITES)
def test_sites_and_their_kinds_are_found_from_what_feeds_what(tmp_path: Path, family: str) -> None:
    statistics = calibrated(make_model(family, tmp_path))
    last_stack = [site.stack for site in statistics.linear_sites if site.stack][-1]
    for layer in (0, 1):
        sites = [s for s in statistics.linear_sites if (s.stack, s.layer) == (last_stack, layer)]
        found = [(s.kind, tuple(x.name.partition(f".{layer}.")[2] for x in s.linears)) for s in sites]
        assert found == SITES[family]


def test_a_router_that_returns_more_than_its_product_is_measured_like_other_linears(tmp_path: Path) -> None:
    """Llama 4's is an nn.Linear that returns scores and products."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "vocab_size": 94,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts)).bfloat16().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    linears = {linear.name: linear for site in calibrated(tmp_path).linear_sites for linear in site.linears}
    assert linears["model.layers.1.feed_forward.router"].output_mean_square > 0
    assert linears["model.layers.1.feed_forward.shared_expert.up_proj"].output_mean_square > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_statistics_are_those_of_the_whole_models_inputs(dtype: torch.dtype, tmp_path: Path) -> None:
    """In float32 too, where a copy that is not made would change what the model computes."""
    statistics = calibrated(make_model("llama", tmp_path, dtype=dtype), tokens=32)
    model = type(build_tiny(ALL["llama"])).from_pretrained(tmp_path, dtype="auto").eval()
    site = next(s for s in statistics.sites if s.name == "model.layers.1.mlp.down_proj")
    linear = model.get_submodule(site.name)
    expected, squares = InputStatistics(56), []
    linear.register_forward_pre_hook(lambda module, inputs: expected.update(inputs[0]))
    linear.register_forward_hook(lambda module, inputs, y: squares.append(y.float().square().sum(-1)))
    for inputs in calibrate_inputs(tmp_path):
        with torch.no_grad():
            model(**inputs)
    for name in ("minimum", "maximum", "absmax_later", "absmax_position", "mean_square", "share_over"):
        assert torch.equal(getattr(site.inputs, name), getattr(expected.summary(), name)), name
    assert site.inputs.positions == 32
    assert site.linears[0].output_mean_square == pytest.approx(float(torch.cat(squares, 1).mean()), rel=1e-5)


def calibrate_inputs(directory: Path) -> list[dict[str, torch.Tensor]]:
    from int8cli.model.config import read_config
    from int8cli.model.sampling import Sampling
    from int8cli.model.text import sequences_of

    return sequences_of(some_text(), directory, read_config(directory), Sampling(32, 16, 0))


def plant(model: torch.nn.Module, dimensions: list[int], scale: float) -> None:
    """Plant outliers without changing the model's function: gains times a power of two, columns divided by it."""
    for layer in model.model.layers:
        fed = {
            layer.input_layernorm: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            layer.post_attention_layernorm: ("mlp.gate_proj", "mlp.up_proj"),
        }
        for norm, linears in fed.items():
            norm.weight[dimensions] *= scale
            for name in linears:
                layer.get_submodule(name).weight[:, dimensions] /= scale


def test_planted_outliers_are_found_at_every_norm_fed_site(tmp_path: Path) -> None:
    plain = calibrated(make_model("llama", tmp_path / "plain"))
    planted = calibrated(make_model("llama", tmp_path / "planted", lambda model: plant(model, [3, 17], 32.0)))
    assert plain.features() == ()
    assert sorted(found.feature.dimension for found in planted.features()) == [3, 17]
    for found in planted.features():
        assert found.layers == (0, 1)
    norm_fed = [site for site in planted.sites if site.kind == "norm-fed"]
    assert len(norm_fed) == 4
    assert all((site.inputs.share_over > 0.5).nonzero().squeeze(1).tolist() == [3, 17] for site in norm_fed)
    residual = [[s.inputs for s in found.sites if s.kind == RESIDUAL] for found in (plain, planted)]
    assert all(torch.equal(a.maximum, b.maximum) for a, b in zip(*residual, strict=True))


class Killed(BaseException):
    """Ends a calibration as a signal would."""


class KilledAfter(SilentProgress):
    def __init__(self, blocks: int) -> None:
        self.left = blocks
        self.run: list[str] = []
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if amount == 0:  # a block begins
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.run.append(part)


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "gpt2", "deberta-v2"])
def test_a_killed_run_resumes_with_the_same_statistics(tmp_path: Path, family: str) -> None:
    make_model(family, tmp_path / "model")
    kept = tmp_path / "work" / "blocks"
    whole = saved(calibrated(tmp_path / "model"), tmp_path / "whole.safetensors")
    blocks = []
    for count in (1, 2) if family in ("t5", "bart") else (1,):
        progress = KilledAfter(count)
        with pytest.raises(Killed):
            calibrated(tmp_path / "model", state_directory=kept, progress=progress)
        blocks += progress.run
        assert kept.is_dir()
    progress = KilledAfter(100)
    resumed = saved(
        calibrated(tmp_path / "model", state_directory=kept, progress=progress), tmp_path / "resumed.safetensors"
    )
    blocks += progress.run
    assert len(set(blocks)) >= 2
    assert blocks[0] != blocks[1]  # the finished block is not run again
    assert resumed == whole
    assert not kept.parent.exists()


def test_another_text_starts_over(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    kept = tmp_path / "work" / "blocks"
    with pytest.raises(Killed):
        calibrated(tmp_path / "model", state_directory=kept, progress=KilledAfter(1))
    progress = KilledAfter(100)
    calibrated(tmp_path / "model", text=some_text(seed=5), state_directory=kept, progress=progress)
    assert progress.run == ["model.layers.0", "model.layers.1"]


def test_a_model_that_repeats_its_block_resumes_correctly(tmp_path: Path) -> None:
    make_model("albert", tmp_path / "model")
    kept = tmp_path / "work" / "blocks"
    whole = saved(calibrated(tmp_path / "model"), tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        calibrated(tmp_path / "model", state_directory=kept, progress=KilledAfter(1))
    assert saved(calibrated(tmp_path / "model", state_directory=kept), tmp_path / "again.safetensors") == whole


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("record.json", False),  # then nothing is known to be there
        ("model.layers.0@1/0.pt", True),
        ("model.layers.0.safetensors", True),
    ],
)
@pytest.mark.parametrize("left_bytes", [0, 20, None])
def test_state_that_cannot_be_read_back_is_made_again(
    tmp_path: Path, file: str, told: bool, left_bytes: int | None
) -> None:
    make_model("llama", tmp_path / "model")
    kept = tmp_path / "work" / "blocks"
    whole = saved(calibrated(tmp_path / "model"), tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        calibrated(tmp_path / "model", state_directory=kept, progress=KilledAfter(1))
    if left_bytes is None:
        (kept / file).unlink()
    else:
        (kept / file).write_bytes((kept / file).read_bytes()[:left_bytes])
    progress = KilledAfter(100)
    again = calibrated(tmp_path / "model", state_directory=kept, progress=progress)
    assert saved(again, tmp_path / "again.safetensors") == whole
    assert progress.run == ["model.layers.0", "model.layers.1"]
    assert any(note.endswith("starting over") for note in progress.notes) == told


@pytest.mark.parametrize(
    "change",
    [
        lambda record, elsewhere: record["latest"].update(dict.fromkeys(record["latest"], f"../../{elsewhere}@1")),
        lambda record, elsewhere: record["latest"].update(dict.fromkeys(record["latest"], "..")),
        lambda record, elsewhere: record["finished"].append(f"../../{elsewhere}@1"),
        lambda record, elsewhere: record.update(finished=5),
        lambda record, elsewhere: record.update(latest=[["model.layers", 5]]),
        lambda record, elsewhere: record.clear(),
    ],
)
def test_an_invalid_record_of_blocks_is_ignored(change: Callable[[Any, str], object], tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    kept, precious = tmp_path / "work" / "blocks", tmp_path / "precious@1" / "0.pt"
    precious.parent.mkdir()
    precious.write_text("precious")
    whole = saved(calibrated(tmp_path / "model"), tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        calibrated(tmp_path / "model", state_directory=kept, progress=KilledAfter(1))
    record = json.loads((kept / "record.json").read_text())
    change(record, "precious")
    (kept / "record.json").write_text(json.dumps(record))
    again = calibrated(tmp_path / "model", state_directory=kept)
    assert saved(again, tmp_path / "again.safetensors") == whole
    assert precious.read_text() == "precious"


def test_state_that_cannot_be_read_back_in_the_run_that_made_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path / "model")
    save = torch.save

    def save_half(saved: object, file: BinaryIO) -> None:
        whole = io.BytesIO()
        save(saved, whole)
        file.write(whole.getvalue()[:100])

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(SavedStateError, match=r"0\.pt cannot be read back"):
        calibrated(tmp_path / "model", state_directory=tmp_path / "work" / "blocks")


def test_two_runs_on_one_state_are_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    kept = tmp_path / "work" / "blocks"

    class Second(SilentProgress):
        def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
            with pytest.raises(OutputInUseError, match="another int8cli"):
                calibrated(tmp_path / "model", state_directory=kept)

    calibrated(tmp_path / "model", state_directory=kept, progress=Second())


def saved(statistics: OutlierStatistics, path: Path) -> bytes:
    save_statistics(statistics, path)
    return path.read_bytes()


def test_a_statistics_file_is_read_back_unchanged(tmp_path: Path) -> None:
    statistics = calibrated(make_model("gpt2", tmp_path / "model"))
    data = saved(statistics, tmp_path / "a.safetensors")
    read = load_statistics(tmp_path / "a.safetensors")
    assert read.provenance == statistics.provenance
    assert saved(read, tmp_path / "b.safetensors") == data
    assert read.linear_sites[0].linears[0].in_features == 32
    assert read.linear_sites[0].linears[0].out_features == 96  # Conv1D stores it the other way around


def test_other_files_are_not_read_as_statistics(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    make_model("llama", tmp_path / "model")
    for path in (tmp_path / "text.safetensors", tmp_path / "model/model.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="outlier statistics"):
            load_statistics(path)


def test_a_nan_in_a_weight_names_the_layer(tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan

    with pytest.raises(
        NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj: its weight contains nan in input column 5"
    ):
        calibrated(make_model("llama", tmp_path, spoil))


def test_a_model_that_makes_nan_names_the_layer(tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].post_attention_layernorm.weight[7] = torch.nan

    with pytest.raises(
        NonFiniteError, match=r"model\.layers\.1\.mlp\.gate_proj: its input contains nan at .*dimension 7"
    ):
        calibrated(make_model("llama", tmp_path, spoil))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (b" \n\t ", "empty"), (b"caf\xe9", "not UTF-8.*0xe9 at offset 3")],
)
def test_bad_text_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TextError, match=message):
        Text.decode("story.txt", data)


def test_a_text_too_short_for_one_sequence_is_refused_with_a_hint(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(TextError, match="has 11 tokens, but a sequence needs 16") as caught:
        calibrated(tmp_path, text=some_text(11))
    assert "sequences of 11 tokens" in caught.value.hint
    assert calibrated(tmp_path, text=some_text(11), sequence_length=11).provenance.tokens == 11


def test_the_seed_chooses_the_pieces(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    first, again, other = (calibrated(tmp_path, seed=seed).sites[0].inputs.minimum for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_missing_tokenizer_is_reported_with_the_missing_file(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(CannotRunError, match="tokenizer") as caught:
        calibrated(tmp_path)
    assert "tokenizer.json" in caught.value.hint


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = (tmp_path / "config.json").read_text()
    renamed = config.replace('"model_type": "llama"', '"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}')
    (tmp_path / "config.json").write_text(renamed)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CannotRunError, match="never run"):
        calibrated(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.down_proj\.weight"):
        calibrated(tmp_path)


def test_too_little_memory_is_an_error_with_the_size_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path)
    monkeypatch.setattr(calibrate_module, "available_bytes", lambda device: 1000)
    # q, o 32 x 32; k, v 16 x 32; gate, up, down 56 x 32; two norms: 8,512 weights of 2 bytes
    with pytest.raises(NotEnoughMemoryError, match=r"17\.0 kB of weights.*, 1\.00 kB free"):
        calibrated(tmp_path)


def test_a_vision_model_is_refused_with_a_message(tmp_path: Path) -> None:
    build_tiny(ALL["vit"]).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(CannotRunError, match="text"):
        calibrated(tmp_path)


def test_a_strand_stands_still_between_questions() -> None:
    heard: list[int] = []

    def count(ask) -> None:
        for number in range(3):
            heard.append(ask(number))

    strand: Strand[int, int] = Strand(count)
    assert strand.advance() == 0
    assert strand.advance(10) == 1
    assert heard == [10]
    strand.close()
    assert heard == [10]


def test_an_exception_in_a_strand_is_raised_in_the_waiting_thread() -> None:
    def fail(ask) -> None:
        ask(1)
        raise ValueError("within")

    strand: Strand[int, int] = Strand(fail)
    strand.advance()
    with pytest.raises(ValueError, match="within"):
        strand.advance(2)
    assert strand.finished


def save_with_heads_in_the_config_alone(directory: Path, family: str, **options: Any) -> type:
    """The weights of the bare model, beside a config.json that names the class with heads. Returns the bare class."""
    model = build_tiny(ALL[family])
    bare = type(model.base_model)(model.config, **options)
    bare.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | {"architectures": [type(model).__name__]}
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    return type(bare)


@pytest.mark.parametrize("family", ["mpnet", "bert", "roberta", "llama"])
def test_a_checkpoint_without_the_heads_that_its_config_names_is_run_bare(tmp_path: Path, family: str) -> None:
    """all-mpnet-base-v2 is such a one."""
    bare_class = save_with_heads_in_the_config_alone(tmp_path, family)
    assert type(Streamed(tmp_path).skeleton.model) is bare_class
    assert calibrated(tmp_path).sites


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_bare_encoder_without_a_pooler_is_run_without_one(tmp_path: Path, family: str, heads: bool) -> None:
    bare_class = save_with_heads_in_the_config_alone(tmp_path, family, add_pooling_layer=False)
    if not heads:
        config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [bare_class.__name__]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert calibrated(tmp_path).sites


def test_a_checkpoint_with_a_part_of_its_heads_is_incomplete(tmp_path: Path) -> None:
    build_tiny(ALL["mpnet"]).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for lm_head\.dense\.weight"):
        calibrated(tmp_path)


def test_a_config_of_a_model_without_end_is_refused(tmp_path: Path) -> None:
    """As many layers as may be, each of many parts: more than tensors that are there could ever fill."""
    directory = make_model("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": 10_000}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotRunError, match="far more parts than the 0 tensors here"):
        build_skeleton(directory, {})
