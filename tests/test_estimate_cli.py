"""`int8cli estimate-memory`, as a user runs it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import LISTED, OTHERS, build_tiny, save_by_hand
from support.hub_stand_in import Fault, HubStandIn
from support.program import Nursery, Outcome, environment, llama

REPO = "org/model"
HEADER_READ_BYTES = 128 << 10


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that are larger than what is read for their headers."""
    return llama(tmp_path_factory.mktemp("published") / "model", layers=4, hidden=256, intermediate=512, shards=4)


def estimate(nursery: Nursery, *args: str | Path, cwd: Path, **env: str) -> Outcome:
    return nursery.run("estimate-memory", *args, cwd=cwd, env=env)


def document(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_json_is_one_document_in_bytes(nursery: Nursery, published: Path) -> None:
    found = document(estimate(nursery, published, "--json", "--context", "100", "--batch", "2", cwd=published))
    assert found["schema"] == "int8cli.memory/1"
    assert found["stored"]["bytes"] == sum(file.stat().st_size for file in published.glob("*.safetensors"))
    assert found["kv_cache"]["bytes_a_token"] == 4 * 2 * 256 * 2
    assert found["kv_cache"]["bytes"] == 2 * 100 * found["kv_cache"]["bytes_a_token"]
    assert found["total"]["int8_bytes"] == (
        found["weights"]["int8_bytes"]
        + found["weights"]["buffer_bytes"]
        + found["kv_cache"]["bytes"]
        + found["workspace"]["int8_bytes"]
    )
    assert found["cards"]["table"][0]["int8"] == {"weights": 1, "in_use": 1}


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "bert", "vit", "mamba", "gemma2", "deepseek_v3", "xlnet"])
def test_the_terminal_view_exists_for_every_kind_of_model(name: str, nursery: Nursery, tmp_path: Path) -> None:
    build_tiny((LISTED | OTHERS)[name]).save_pretrained(tmp_path)
    for cards in ((), ("--gpu", "8x RTX 3090", "--gpu", "24GiB")):
        outcome = estimate(nursery, tmp_path, *cards, cwd=tmp_path, COLUMNS="200")
        assert outcome.code == 0, outcome.err
        assert "To convert" in outcome.out
        assert "LLM.int8()" in outcome.out


def test_the_table_ends_where_one_card_is_enough(nursery: Nursery, published: Path) -> None:
    shown = estimate(nursery, published, cwd=published).out
    assert "RTX 4060" in shown
    assert "B200" not in shown
    assert "One card is enough if it is larger than these." in shown
    more = estimate(nursery, published, "--context", "40000000", cwd=published).out
    assert "MI300X" in more


def test_the_share_of_parameters_that_become_int8_is_shown(nursery: Nursery, published: Path) -> None:
    found = document(estimate(nursery, published, "--json", cwd=published))
    assert 90 < found["percent_quantized"] < 100
    shown = estimate(nursery, published, cwd=published).out
    assert f"{found['percent_quantized']:.1f} % become int8" in shown


def test_safetensors_need_no_torch(published: Path) -> None:
    code = (
        "import sys; from int8cli.cli import app\n"
        f"try: app(['estimate-memory', {str(published)!r}, '--gpu', '24GiB'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize(("cards", "fits"), [("24GiB", True), ("525MiB", False)])
def test_yes_and_no_both_exit_0(cards: str, fits: bool, nursery: Nursery, published: Path) -> None:
    found = document(estimate(nursery, published, "--json", "--gpu", cards, cwd=published))
    given = {answer["precision"]: answer for answer in found["cards"]["answers"]}
    assert given["int8"]["fits"] == fits
    card = given["int8"]["placement"][0]
    taken = card["weight_bytes"] + card["kv_bytes"] + card["workspace_bytes"]
    assert card["left_bytes"] == card["usable_bytes"] - taken >= 0
    assert bool(given["int8"]["without_a_card"]) == (not given["int8"]["holds_weights"])


def test_cards_are_placed_in_the_order_given(nursery: Nursery, published: Path) -> None:
    found = document(estimate(nursery, published, "--json", "--gpu", "24GiB, 2xT4", cwd=published))
    assert [card["card"] for card in found["cards"]["answers"][0]["placement"]] == ["24GiB", "T4", "T4"]


def test_each_gpu_option_is_a_question_of_its_own(nursery: Nursery, published: Path) -> None:
    found = document(estimate(nursery, published, "--json", "--gpu", "525MiB", "--gpu", "24GiB", cwd=published))
    answers = {(answer["machine"], answer["precision"]): answer["fits"] for answer in found["cards"]["answers"]}
    assert answers == {
        ("525MiB", "float16"): False,
        ("525MiB", "int8"): False,
        ("24GiB", "float16"): True,
        ("24GiB", "int8"): True,
    }


def test_a_machine_that_is_too_small_is_told_what_would_do(nursery: Nursery, published: Path) -> None:
    arguments = ("--gpu", "545MiB", "--context", "4096")
    found = document(estimate(nursery, published, "--json", *arguments, cwd=published))
    shown = estimate(nursery, published, *arguments, cwd=published).out
    (missing,) = found["cards"]["shortages"]
    assert missing["offloaded_bytes"] >= 0
    count = missing["cards_needed"]
    if count is None:
        assert "--gpu" not in shown
    else:
        again = document(
            estimate(nursery, published, "--json", "--gpu", f"{count}x545MiB", *arguments[2:], cwd=published)
        )
        assert [each["fits"] for each in again["cards"]["answers"] if each["precision"] == "int8"] == [True]
        assert f" --gpu '{count}x 545MiB'" in shown


def test_an_unknown_card_lists_those_that_are_known(nursery: Nursery, published: Path) -> None:
    outcome = estimate(nursery, published, "--gpu", "RTX 9999", cwd=published)
    words = " ".join(outcome.err.split())
    assert "RTX 3090" in words
    assert "MI300X" in words


@pytest.mark.parametrize(
    "arguments", [("--gpu", "RTX 9999"), ("--gpu", "24"), ("--context", "0"), ("--batch", "0"), ("--kv-dtype", "int3")]
)
def test_nonsense_is_a_usage_error(arguments: tuple[str, str], nursery: Nursery, published: Path) -> None:
    outcome = estimate(nursery, published, *arguments, cwd=published)
    assert outcome.code == 2
    assert arguments[0] in outcome.err
    assert not outcome.out


def test_an_unknown_cache_is_reported_as_unknown(nursery: Nursery, tmp_path: Path) -> None:
    config = {"model_type": "novel", "layer_types": ["lightning"]}
    save_by_hand(tmp_path, {"layers.0.fc.weight": torch.ones(8, 8), "layers.0.fc.bias": torch.ones(8)}, config)
    shown = estimate(nursery, tmp_path, cwd=tmp_path)
    assert "unknown: layers of the type 'lightning'" in shown.out
    found = document(estimate(nursery, tmp_path, "--json", cwd=tmp_path))
    assert found["kv_cache"]["bytes"] is None
    assert "lightning" in found["kv_cache"]["reason"]
    assert found["total"] == {"float16_bytes": None, "int8_bytes": None}


class User:
    """Somebody with an empty home and this Hub."""

    def __init__(self, hub: HubStandIn, nursery: Nursery, home: Path) -> None:
        self.hub, self._nursery, self._home = hub, nursery, home

    def estimate(self, *args: str, **env: str) -> Outcome:
        places = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self._home / "hf")}
        return estimate(self._nursery, REPO, *args, cwd=self._home, **(places | env))

    def left_behind(self) -> list[Path]:
        return [path for path in self._home.rglob("*") if path.is_file()]


@pytest.fixture
def user(nursery: Nursery, tmp_path: Path) -> Iterator[User]:
    with HubStandIn() as hub:
        yield User(hub, nursery, tmp_path)


def test_from_the_hub_only_the_beginnings_of_shards_are_transferred(user: User, published: Path) -> None:
    user.hub.add_repo(REPO, published)
    found = document(user.estimate("--json"))
    shards = sorted(file.name for file in published.glob("*.safetensors"))
    assert [user.hub.bytes_sent(shard) <= HEADER_READ_BYTES for shard in shards] == [True] * 4
    assert all((published / shard).stat().st_size > HEADER_READ_BYTES for shard in shards)
    local = document(estimate(user._nursery, published, "--json", cwd=published))
    assert found["weights"] == local["weights"]
    assert found["conversion"]["download_bytes"] == found["stored"]["bytes"]
    assert local["conversion"]["download_bytes"] == 0
    output, largest = found["conversion"]["output_bytes"], sorted((published / s).stat().st_size for s in shards)[-2:]
    beside = local["conversion"]["disk_bytes"] - output  # records, report, index
    assert output + beside < found["conversion"]["disk_bytes"] <= output + beside + sum(largest)
    assert found["conversion"]["disk_keeping_source_bytes"] == output + beside + found["stored"]["bytes"]
    assert user.left_behind() == []


def test_pickled_shards_are_estimated_over_http_too(user: User, published: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    directory.mkdir()
    weight_map = {}
    for number, file in enumerate(sorted(published.glob("*.safetensors")), start=1):
        tensors = load_file(file)
        name = f"pytorch_model-{number:05}-of-00004.bin"
        torch.save(tensors, directory / name)
        weight_map.update(dict.fromkeys(tensors, name))
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_bytes((published / "config.json").read_bytes())
    user.hub.add_repo(REPO, directory)
    found = document(user.estimate("--json"))
    assert found["weights"] == document(estimate(user._nursery, published, "--json", cwd=published))["weights"]
    sent = sum(user.hub.bytes_sent(name) for name in set(weight_map.values()))
    assert sent < found["stored"]["bytes"]


def test_a_gated_model_opens_with_a_token_and_not_without(user: User, published: Path) -> None:
    user.hub.add_repo(REPO, published, gated=True, token="hf_secret")
    refused = user.estimate()
    assert refused.code == 1
    assert refused.err.startswith("error:")
    assert "hint:" in refused.err
    assert document(user.estimate("--json", HF_TOKEN="hf_secret"))["files"] == 4


def test_a_file_that_fails_permanently_is_named(user: User, published: Path) -> None:
    user.hub.add_repo(REPO, published)
    user.hub.fail("model-00003-of-00004.safetensors", Fault(status=403, times=1000))
    outcome = user.estimate()
    assert outcome.code == 1
    assert "model-00003-of-00004.safetensors" in outcome.err


def test_a_missing_model_is_an_error_with_a_hint(nursery: Nursery, tmp_path: Path) -> None:
    outcome = estimate(nursery, "./nothing-here", cwd=tmp_path)
    assert outcome.code == 1
    assert "hint:" in outcome.err
