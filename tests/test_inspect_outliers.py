"""`int8cli inspect-outliers`, as a user runs it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.calibration_models import WORDS, make_model
from support.checkpoints import LISTED, build_tiny, survey
from support.hub_stand_in import HubStandIn
from support.program import environment
from test_calibrate import plant
from typer.testing import CliRunner, Result

from int8cli.checkpoint.locate import open_source
from int8cli.cli import app
from int8cli.errors import MissingExtraError
from int8cli.outliers.statistics_file import load_statistics
from int8cli.outliers.suspects import find_suspects
from int8cli.report.outliers import common_prefix, ranges
from int8cli.report.vega import require_altair


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with two planted outlier features, and a text for its tokenizer."""
    directory = make_model("llama", tmp_path_factory.mktemp("planted") / "my-model", lambda m: plant(m, [3, 17], 32.0))
    (directory.parent / "words.txt").write_text(" ".join(WORDS * 3))
    return directory


def inspect(model: Path, *arguments: str | Path, tmp_path: Path) -> Result:
    text = model.parent / "words.txt"
    own = ["--text", text, "--sequence-length", "16", "--tokens", "64"] if text.exists() else []
    every = ["inspect-outliers", model, *own, "--work-dir", tmp_path / "work", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in every])


def test_the_summary_comes_first(model: Path, tmp_path: Path) -> None:
    result = inspect(model, "-q", "--json", tmp_path=tmp_path)
    assert result.exit_code == 0
    result = inspect(model, tmp_path=tmp_path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "my-model, 64 tokens in sequences of 16"
    assert lines[2].startswith("2 systematic outlier features: ")
    for title in ("Outlier features", "Inputs of linear layers, by kind", "Inputs with the largest predicted error"):
        assert any(line.startswith(title) for line in lines)
    assert "[1/2] model.layers.0" in result.stderr
    assert "[2/2] model.layers.1" in result.stderr
    assert not list((tmp_path / "work").iterdir())


def test_json_is_one_document_on_stdout(model: Path, tmp_path: Path) -> None:
    result = inspect(model, "--json", tmp_path=tmp_path)
    found = json.loads(result.stdout)
    assert found["schema"] == "int8cli.outliers/1"
    assert (found["from"], found["tokens"], found["threshold"]) == ("activations", 64, 6.0)
    assert sorted(feature["dimension"] for feature in found["features"]) == [3, 17]
    site = next(site for site in found["sites"] if site["name"] == "model.layers.1.self_attn.q_proj")
    assert site["kind"] == "norm-fed"
    assert [linear["name"].rpartition(".")[2] for linear in site["linears"]] == ["q_proj", "k_proj", "v_proj"]
    assert sorted(d["dimension"] for d in site["largest_dimensions"][:2]) == [3, 17]
    for linear in site["linears"]:
        assert 0 < linear["predicted_error_int8_weights"] < linear["predicted_error_vector_wise"] < 1


def test_every_kind_of_output_is_written(model: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"out{suffix}" for suffix in (".html", ".png", ".svg", ".safetensors")]
    arguments = [argument for file in files for argument in ("-o", file)]
    result = inspect(model, "-q", *arguments, tmp_path=tmp_path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.glob("out*")) == sorted(file.name for file in files)
    statistics = load_statistics(files[-1])
    assert statistics.provenance.model == "my-model"
    with safe_open(files[-1], framework="pt") as file:
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_error").shape == (56,)


def test_planted_outliers_are_ranked_first_and_called_suspects(tmp_path: Path) -> None:
    """Gains alone are not outliers. What earlier layers write to a dimension counts too, as in a trained model."""

    def make_large(model: torch.nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[5] *= 16
            layer.input_layernorm.weight[5] *= 4
            layer.post_attention_layernorm.weight[5] *= 4

    directory = make_model("llama", tmp_path / "model", make_large)
    result = inspect(directory, "--from", "weights", tmp_path=tmp_path)
    assert result.exit_code == 0
    assert "suspects, from the weights alone" in result.stdout
    assert "precision" in result.stdout
    assert "outlier feature" not in result.stdout
    found = json.loads(inspect(directory, "--from", "weights", "--json", tmp_path=tmp_path).stdout)
    assert found["from"] == "weights"
    assert found["suspects"][0]["dimension"] == 5
    assert found["suspects_measured"]["average_precision"] > 0
    assert "features" not in found


@pytest.mark.parametrize("family", ["bloom", "opt", "gpt2", "gpt_neox", "gemma2", "bert", "mpt", "phi3"])
def test_suspects_are_found_in_every_family(tmp_path: Path, family: str) -> None:
    """Both norms of each block are scored, by the layers before them that write to the residual stream."""
    build_tiny(LISTED[family]).save_pretrained(tmp_path)
    source = open_source(str(tmp_path), revision=None, download_dir=tmp_path / "incoming")
    read: list[str] = []
    found = find_suspects(source, survey(tmp_path), on_tensor=lambda name, size: read.append(name))
    assert {site.layer for site in found.sites} == {0, 1}
    assert len(found.sites) >= 4
    matrices = [name for name in read if survey(tmp_path).decisions[name].quantize]
    assert len(matrices) == 4  # attention output and second feed-forward of both blocks
    assert len(read) == len(set(read))


def test_if_the_model_cannot_run_the_weights_are_used_and_a_note_says_so(model: Path, tmp_path: Path) -> None:
    copied = make_model("llama", tmp_path / "model")
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    result = inspect(copied, tmp_path=tmp_path)
    assert result.exit_code == 0
    assert "falling back to the weights" in result.stderr
    assert "suspects" in result.stdout
    refused = inspect(copied, "--from", "activations", tmp_path=tmp_path)
    assert refused.exit_code == 1
    assert "\nerror: the tokenizer cannot be loaded" in refused.stderr
    assert "hint: " in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "report.pdf"], "report.pdf is not a"),
        (["-o", "out.safetensors", "--from", "weights"], "statistics need activations"),
        (["--from", "weights", "--smooth"], "found by running the model"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_usage_errors_end_with_two(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = inspect(model, *arguments, tmp_path=tmp_path)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_missing_text_is_an_error(model: Path, tmp_path: Path) -> None:
    result = inspect(model, "--text", tmp_path / "none.txt", tmp_path=tmp_path)
    assert result.exit_code == 1
    assert "none.txt cannot be read" in result.stderr


def test_missing_extras_are_named_with_how_to_get_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = inspect(model, "--from", "activations", tmp_path=tmp_path)
    assert result.exit_code == 1
    assert "hint: pip install 'int8cli[calibrate]'" in result.stderr
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtraError) as caught:
        require_altair()
    assert "int8cli[plots]" in caught.value.hint


def test_a_process_killed_between_blocks_resumes(model: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the first block is reported, then the same command again."""
    command = [
        *(sys.executable, "-m", "int8cli", "inspect-outliers", str(model), "--text", str(model.parent / "words.txt")),
        *("--sequence-length", "16", "--tokens", "64", "--work-dir", str(tmp_path / "work")),
    ]
    killed = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    record = "record.json"
    for line in killed.stderr:
        if "[1/2]" in line:
            break
    while killed.poll() is None and not list((tmp_path / "work").rglob(record)):
        pass
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    result = inspect(model, "-o", tmp_path / "resumed.safetensors", tmp_path=tmp_path)
    assert result.exit_code == 0
    if killed.returncode == -signal.SIGKILL:
        assert "[1/2] model.layers.0" not in result.stderr
        assert "resuming: " in result.stderr
    whole = inspect(model, "-o", tmp_path / "whole.safetensors", tmp_path=tmp_path)
    assert whole.exit_code == 0
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_from_the_hub_each_shard_comes_once_and_none_stays(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "words.txt").write_text(" ".join(WORDS * 3))
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) >= 3
    arguments = ["--text", "words.txt", "--sequence-length", "16", "--tokens", "64", "--work-dir", "work"]
    with HubStandIn() as hub:
        hub.add_repo("org/name", tmp_path / "model")
        result = subprocess.run(
            [sys.executable, "-m", "int8cli", "inspect-outliers", "org/name", *arguments, "-o", "hub.safetensors"],
            env=environment(HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home")),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        for shard in shards:
            whole = [request for request in hub.of(shard.name) if request.bytes_sent >= shard.stat().st_size]
            assert len(whole) <= 1
        assert hub.bytes_sent(shards[1].name) >= shards[1].stat().st_size
    assert load_statistics(tmp_path / "hub.safetensors").provenance.revision is not None
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_runs_of_numbers_are_shortened() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_names_are_shortened_by_whole_components() -> None:
    assert common_prefix(["model.layers.1.q", "model.layers.12.q"]) == "model.layers."
    assert common_prefix(["a", "b"]) == ""
    assert common_prefix([]) == ""
