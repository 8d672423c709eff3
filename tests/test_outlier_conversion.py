"""convert --outliers: the sources of columns, one download for calibration and conversion, and resuming."""

import json
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import calibrated, make_model, save_tokenizer, some_text
from support.checkpoints import LISTED, build_tiny, read_all, read_tensors, save_by_hand, survey
from support.hub_stand_in import Fault, HubStandIn
from support.program import Nursery, llama, tree, wait_until

from int8cli import ConvertOptions, convert, plan_conversion
from int8cli.checkpoint import locate
from int8cli.checkpoint.hub import HubOptions
from int8cli.errors import (
    DiskSpaceError,
    NotEnoughMemoryError,
    SavedStateError,
    StatisticsChangedError,
    StatisticsMismatchError,
    TextError,
    UnsupportedModelError,
)
from int8cli.outliers import suspects
from int8cli.outliers.residual_stream import ResidualStream
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import save_statistics
from int8cli.outliers.suspects import SuspectScan
from int8cli.planning.room import Room
from int8cli.progress import BYTES, SilentProgress

REPO = "org/model"
SMALL: dict[str, Any] = {"max_shard_size": "30KB"}


class Notes(SilentProgress):
    """Records the notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


class StopError(Exception):
    """Ends a run in the middle."""


class StopsAfter(SilentProgress):
    """Ends a run after some parts of a task."""

    def __init__(self, task: str, parts: int) -> None:
        self._task, self._left = task, parts

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if task == self._task and part is not None:
            self._left -= 1
            if self._left == 0:
                raise StopError


class FailsAt(SilentProgress):
    """Ends a conversion with an error when it begins with its so many-th shard. Takes down what else it hears.

    `resumed` has, for each time that a calibration began, the blocks that were finished; `threads` those of torch, by
    task, when a part of it began.
    """

    def __init__(self, shard: int = 0, error: Exception | None = None) -> None:
        self._left, self._error = shard, error or StopError()
        self.resumed: list[set[str]] = []
        self.threads: dict[str, set[int]] = {}
        self.said: list[str] = []

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        if task == "calibrate":
            self.resumed.append(set(finished))

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if amount == 0:
            self.threads.setdefault(task, set()).add(torch.get_num_threads())
            if task == "convert":
                self._left -= 1
                if self._left == 0:
                    raise self._error

    def note(self, message: str) -> None:
        self.said.append(message)


def options(outliers: str | Path = "auto", text: Path | None = None, **changes: Any) -> ConvertOptions:
    """Three columns of each linear, by a short run of the model where one is made."""
    chosen = {"outlier_columns": 3, "tokens": 48, "sequence_length": 16, **changes}
    return ConvertOptions(outliers=outliers, text=text, **chosen)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama") / "model", **SMALL)


@pytest.fixture(scope="module")
def unbroken(model: Path, words: Path) -> dict[str, bytes]:
    return tree(convert(model, model.parent / "unbroken", options(text=words)).output)


def sidecars(output: Path) -> dict[str, torch.Tensor]:
    files = sorted((output / "int8/outliers").rglob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


# Where the columns are known from


def test_auto_runs_the_model_and_every_linear_gets_its_columns(
    model: Path, words: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = convert(model, output, options(text=words)).report
    assert report.settings["outliers"] == "activations"
    assert report.settings["calibration"].startswith("words.txt: 48 tokens in sequences of 16, seed 0, sha256 ")
    stored, source = sidecars(output), read_all(model)
    for layer in report.layers:
        columns = stored[f"{layer.name}.outlier_cols"].tolist()
        assert columns == sorted(set(columns)) == list(layer.stored.indices)
        assert len(columns) == 3
        weight = source[f"{layer.name}.weight"][:, columns]
        assert torch.equal(stored[f"{layer.name}.outlier_weight"], weight)
        assert layer.stored.measured.with_stored < layer.stored.measured.all_int8
        assert layer.stored.predicted.with_stored < layer.stored.predicted.all_int8
    assert tree(output) == unbroken


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "opt", "bert", "t5", "mixtral"])
def test_other_architectures_convert_with_their_activations(architecture: str, words: Path, tmp_path: Path) -> None:
    made = make_model(architecture, tmp_path / "model")
    report = convert(made, tmp_path / "out", options("activations", words)).report
    reached = [layer for layer in report.layers if layer.stored.columns]
    assert {layer.stored.chosen_from for layer in reached} == {"activations"}
    assert len(reached) >= 0.8 * len(report.layers)


def test_the_files_that_loaders_see_do_not_depend_on_it(
    model: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    without = tree(convert(model, tmp_path / "out", options("none")).output)
    assert not any(name.startswith("int8/outliers") for name in without)
    beside = ("int8/", "README.md")
    assert {n: d for n, d in without.items() if not n.startswith(beside)} == {
        n: d for n, d in unbroken.items() if not n.startswith(beside)
    }


def test_sizes_are_exact_before_converting(model: Path, words: Path, tmp_path: Path) -> None:
    for mode in ("activations", "weights"):
        asked = model, tmp_path / mode, options(mode, words if mode == "activations" else None)
        expected = plan_conversion(*asked).survey.sidecar_bytes
        assert not (tmp_path / mode).exists()
        convert(*asked)
        written = sum(file.stat().st_size for file in (tmp_path / mode / "int8/outliers").rglob("*.safetensors"))
        assert written == expected > 0


def test_statistics_of_a_file_give_what_running_the_model_gives(
    model: Path, words: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    save_statistics(calibrated(model, text=some_text()), tmp_path / "statistics.safetensors")
    output = tmp_path / "out"
    report = convert(model, output, options(tmp_path / "statistics.safetensors")).report
    assert report.settings["outliers"] == "statistics"
    stored = {name: data for name, data in tree(output).items() if name.startswith("int8/outliers/")}
    assert stored == {name: data for name, data in unbroken.items() if name.startswith("int8/outliers/")}
    assert all(layer.stored.measured is None and layer.stored.predicted for layer in report.layers)


def test_statistics_that_are_replaced_while_they_are_read_are_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings would have the digest of one file, and the shards the columns of another."""
    file = tmp_path / "statistics.safetensors"
    statistics = calibrated(model, text=some_text())
    save_statistics(statistics, file)

    def load(path: Path) -> OutlierStatistics:
        save_statistics(replace(statistics, sites=statistics.sites[1:]), file)
        return statistics

    monkeypatch.setattr("int8cli.columns.from_statistics.load_statistics", load)
    with pytest.raises(StatisticsChangedError, match="changed while it was read"):
        convert(model, tmp_path / "out", options(file))
    assert not (tmp_path / "out/int8/records").exists()


def test_statistics_of_another_model_are_refused(
    model: Path, at_hub: Callable[[HubStandIn], Path], tmp_path: Path
) -> None:
    other = make_model("llama", tmp_path / "other", change=lambda m: m.model.norm.weight.mul_(2))
    file = tmp_path / "statistics.safetensors"
    save_statistics(calibrated(other), file)
    with pytest.raises(StatisticsMismatchError, match="not from this model"):
        plan_conversion(model, tmp_path / "out", options(file))
    with HubStandIn() as hub:
        hub.add_repo(REPO, model)
        at_hub(hub)
        statistics = calibrated(model)
        was = statistics.provenance
        for provenance in (replace(was, model=REPO, revision="a" * 40), replace(was, model="org/other")):
            save_statistics(replace(statistics, provenance=provenance), file)
            with pytest.raises(StatisticsMismatchError, match="the statistics were made from"):
                plan_conversion(REPO, tmp_path / "out", options(file))


def test_weights_alone_give_suspects_of_linears_that_a_norm_feeds(model: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", options("weights")).report
    for layer in report.layers:
        fed = layer.name.rpartition(".")[2] not in ("o_proj", "down_proj")
        assert len(layer.stored.columns) == (3 if fed else 0)
        assert all((column.suspicion or 0.0) > 0 for column in layer.stored.columns)
        assert layer.stored.predicted is None


def test_weights_find_a_dimension_that_norms_amplify(tmp_path: Path) -> None:
    def amplify(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            block.input_layernorm.weight[7] *= 64
            block.post_attention_layernorm.weight[7] *= 64

    made = make_model("llama", tmp_path / "model", change=amplify)
    report = convert(made, tmp_path / "out", options("weights", outlier_columns=1)).report
    assert {layer.stored.indices for layer in report.layers} == {(7,), ()}


def test_auto_falls_back_to_the_weights_and_says_why(model: Path, tmp_path: Path) -> None:
    bare = llama(tmp_path / "bare")  # without a tokenizer
    notes = Notes()
    assert plan_conversion(bare, tmp_path / "out", options(), progress=notes).settings.outliers == "weights"
    assert notes.said == ["cannot calibrate (the checkpoint has no tokenizer); falling back to the weights"]
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        plan_conversion(bare, tmp_path / "out", options("activations"))


def test_a_strategy_that_needs_too_much_memory_leaves_the_directory_to_the_next_one(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8cli.outliers.calibrate.available_bytes", lambda device: 1)
    output = tmp_path / "out"
    with pytest.raises(NotEnoughMemoryError):
        convert(model, output, options("activations", words))
    assert not (output / "config.json").exists()
    notes = Notes()
    report = convert(model, output, options(text=words), progress=notes).report
    assert report.settings["outliers"] == "weights"
    assert any(line.startswith("cannot calibrate (one block needs ") for line in notes.said)


def test_auto_stores_nothing_if_both_strategies_fail(tmp_path: Path) -> None:
    made = save_by_hand(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 4)})
    assert convert(made, tmp_path / "out", options()).report.settings["outliers"] == "none"


def test_an_image_model_is_not_run_on_text(tmp_path: Path) -> None:
    made = make_model("vit", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="needs pixel_values, not text"):
        plan_conversion(made, tmp_path / "out", options("activations"))


def test_a_text_that_cannot_be_used_is_an_error_in_auto_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(TextError, match="is empty"):
        plan_conversion(model, tmp_path / "out", options(text=tmp_path / "empty.txt"))


# One download


@pytest.fixture
def at_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[HubStandIn], Path]:
    """Make the library use this Hub, with the test's own cache."""

    def use(hub: HubStandIn) -> Path:
        cache = tmp_path / "cache"
        monkeypatch.setattr(locate, "HubOptions", partial(HubOptions, endpoint=hub.endpoint, cache_dir=cache))
        return cache

    return use


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks in nine shards or so."""
    directory = tmp_path_factory.mktemp("published") / "model"
    tiny = LISTED["llama"]
    deep = build_tiny(replace(tiny, arguments={**tiny.arguments, "num_hidden_layers": 8}), torch.bfloat16)
    deep.save_pretrained(directory, max_shard_size="20KB")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def expected(published: Path, words: Path) -> dict[str, bytes]:
    """The shards and sidecars that a conversion of the local directory writes."""
    return files_of_shards(convert(published, published.parent / "out", options(text=words)).output)


def files_of_shards(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(output).items() if name.endswith(".safetensors")}


@pytest.fixture
def hub(published: Path, at_hub: Callable[[HubStandIn], Path]) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.add_repo(REPO, published)
        at_hub(hub)
        yield hub


class AtOnce(SilentProgress):
    """Counts the shards on this machine whenever one is finished."""

    def __init__(self, incoming: Path) -> None:
        self._incoming = incoming
        self.most = 0

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if task == "convert":
            self.most = max(self.most, len(list(self._incoming.rglob("*.safetensors"))))


def test_calibration_and_conversion_share_one_download(
    hub: HubStandIn, published: Path, words: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    watch = AtOnce(output / "int8/incoming")
    convert(REPO, output, options(text=words), progress=watch)
    shards = sorted(published.glob("*.safetensors"))
    for shard in shards:
        whole = [r for r in hub.requests if r.file == shard.name and r.bytes_sent == shard.stat().st_size]
        assert len(whole) == 1, shard.name
    assert len(shards) >= 8
    assert 0 < watch.most <= 3  # of the block at work, and of the next
    assert not (output / "int8/incoming").exists()
    assert not (output / "int8/calibration").exists()
    assert files_of_shards(output) == expected


def test_a_corrupt_shard_is_detected_before_the_model_uses_it(
    hub: HubStandIn, published: Path, words: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    shard = sorted(published.glob("*.safetensors"))[1]
    hub.fail(shard.name, Fault(corrupt_at=shard.stat().st_size - 5))
    assert files_of_shards(convert(REPO, tmp_path / "out", options(text=words)).output) == expected


def test_an_error_in_the_conversion_leaves_what_was_fetched_for_the_next_run(
    hub: HubStandIn, published: Path, words: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(StopError):
        convert(REPO, output, options(text=words), progress=FailsAt(3))
    incoming = {file.name for file in (output / "int8/incoming").rglob("*.safetensors")}
    done = {file.name for file in output.glob("*.safetensors")}
    assert len(done) == 2
    assert incoming
    assert not incoming & done
    assert files_of_shards(convert(REPO, output, options(text=words)).output) == expected
    for shard in incoming:
        assert hub.bytes_sent(shard) < 2 * (published / shard).stat().st_size, shard
    assert not (output / "int8/incoming").exists()


def test_an_error_of_the_conversion_does_not_start_the_calibration_over(
    model: Path, words: Path, tmp_path: Path
) -> None:
    """Not even if a calibration that cannot be resumed would raise the same error."""
    output = tmp_path / "out"
    with pytest.raises(StopError):
        convert(model, output, options("activations", words), progress=StopsAfter("calibrate", 2))
    watch = FailsAt(1, UnsupportedModelError("of a conversion"))
    with pytest.raises(UnsupportedModelError, match="of a conversion"):
        convert(model, output, options("activations", words), progress=watch)
    assert not [line for line in watch.said if "starting over" in line]
    assert watch.resumed == [{"model.layers.0"}]


def test_torch_has_the_models_threads_while_it_runs_and_one_while_a_shard_is_converted(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8cli.commands.wanted_columns.usable_cores", lambda: 3)
    before = torch.get_num_threads()
    watch = FailsAt()
    convert(model, tmp_path / "out", options(text=words), progress=watch)
    assert watch.threads == {"calibrate": {3}, "convert": {1}}
    with pytest.raises(StopError):
        convert(model, tmp_path / "other", options(text=words), progress=FailsAt(2))
    assert torch.get_num_threads() == before


def test_room_is_asked_for_before_the_first_shard_is_fetched(
    hub: HubStandIn, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: list[bool] = []

    def refuse(
        source: object,
        survey: object,
        remaining: object,
        output: Path,
        at_once: object,
        model_bytes: int,
        left_over: object,
    ) -> Any:
        """There is room for two shards, as each conversion needs, but not for what the model reads at once."""
        if not model_bytes:
            return ()
        shards.append(any((output / "int8/incoming").rglob("*.safetensors*")))
        return (Room(output, model_bytes, 0),)

    monkeypatch.setattr("int8cli.conversion.room.room_needed", refuse)
    with pytest.raises(DiskSpaceError):
        convert(REPO, tmp_path / "out", options("activations", words))
    assert shards == [False]
    assert not [r for r in hub.requests if r.file and r.file.endswith(".safetensors") and r.bytes_sent > 1 << 13]


def test_figures_of_a_corrupt_shard_are_discarded(at_hub: Callable[[HubStandIn], Path], tmp_path: Path) -> None:
    made = llama(tmp_path / "model", layers=4, shards=4)
    whole = convert(made, tmp_path / "whole", options("weights")).output
    shard = sorted(made.glob("*.safetensors"))[0]
    header_bytes = int.from_bytes(shard.read_bytes()[:8], "little")
    tensors = json.loads(shard.read_bytes()[8 : 8 + header_bytes])
    writer = next(each for name, each in tensors.items() if name.endswith("o_proj.weight"))
    exponent_of_first = 8 + header_bytes + writer["data_offsets"][0] + 1  # its dimension would look like an outlier's
    with HubStandIn() as hub:
        hub.add_repo(REPO, made)
        hub.fail(shard.name, Fault(corrupt_at=exponent_of_first))
        at_hub(hub)
        output = convert(REPO, tmp_path / "out", options("weights")).output
    assert files_of_shards(output) == files_of_shards(whole)


# Going on


@pytest.mark.parametrize("block", [1, 2])
def test_a_run_that_ended_in_a_block_resumes_at_that_block(
    block: int, model: Path, words: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(StopError):
        convert(model, output, options(text=words), progress=StopsAfter("calibrate", block))
    assert not (output / "config.json").exists()
    convert(model, output, options(text=words))
    assert tree(output) == unbroken


def test_a_killed_process_resumes_with_the_same_result(
    model: Path, words: Path, nursery: Nursery, tmp_path: Path
) -> None:
    command = (
        "convert",
        model,
        "--outliers",
        "auto",
        "--outlier-columns",
        "3",
        "--text",
        words,
        "--tokens",
        "1024",
        "-q",
    )
    output = tmp_path / "out"
    child = nursery.start(*command, "-o", output, cwd=tmp_path)
    wait_until(lambda: any((output / "int8/calibration").rglob("record.json")), "a finished block")
    child.signal(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    again = nursery.run(*command, "-o", output, cwd=tmp_path)
    assert again.code == 0, again.err
    convert(model, tmp_path / "unbroken", options(text=words, tokens=1024, sequence_length=512))
    assert tree(output) == tree(tmp_path / "unbroken")


def test_figures_of_removed_shards_are_remembered(tmp_path: Path) -> None:
    made = llama(tmp_path / "model", layers=4, shards=4)
    whole = convert(made, tmp_path / "whole", options("weights")).output

    output = tmp_path / "out"
    for _ in range(3):
        with pytest.raises(StopError):
            convert(made, output, options("weights"), progress=StopsAfter("convert", 1))
    convert(made, output, options("weights"))
    assert tree(output) == tree(whole)


def removed(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [removed, cut_short])
def test_figures_of_a_shard_that_cannot_be_read_back_are_made_again(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    made = llama(tmp_path / "model", layers=4, shards=4)
    whole = convert(made, tmp_path / "whole", options("weights")).output
    output = tmp_path / "out"
    with pytest.raises(StopError):
        convert(made, output, options("weights"), progress=StopsAfter("convert", 1))
    damage(output / "int8/calibration/suspects/0.safetensors")
    assert tree(convert(made, output, options("weights")).output) == tree(whole)


def test_figures_that_cannot_be_read_are_an_error_and_never_no_columns(tmp_path: Path) -> None:
    made = llama(tmp_path / "model", layers=4, shards=4)
    whole = convert(made, tmp_path / "whole", options("weights")).output
    output, save_figures = tmp_path / "out", suspects.save_figures

    def save_unreadably(figures: Mapping[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_figures(figures, path, **options)
        if path.name == "1.safetensors":
            path.unlink()
            path.mkdir()  # root may read any file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspects, "save_figures", save_unreadably)
        with pytest.raises(SavedStateError, match=r"1\.safetensors cannot be read back \(.*not a regular file"):
            convert(made, output, options("weights"))
    (output / "int8/calibration/suspects/1.safetensors").rmdir()
    assert tree(convert(made, output, options("weights")).output) == tree(whole)


def test_the_figures_of_each_shard_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the time to choose columns would grow with the square of the number of shards."""
    made = llama(tmp_path / "model", layers=6, shards=6)
    read: Counter[str] = Counter()
    load_figures = suspects.load_figures

    def counted(path: Path) -> dict[str, torch.Tensor]:
        read[path.name] += 1
        return load_figures(path)

    monkeypatch.setattr(suspects, "load_figures", counted)
    convert(made, tmp_path / "out", options("weights"))
    assert read == {f"{place}.safetensors": 1 for place in range(6)}


@pytest.mark.parametrize("seed", range(4))
def test_suspects_do_not_depend_on_the_order_in_which_figures_come(seed: int, tmp_path: Path) -> None:
    """Nor on whether they were asked for in between, which leaves the layers before a change as they were scored."""
    stream = ResidualStream.of(survey(llama(tmp_path / "model", layers=5, shards=3)))
    generator = torch.Generator().manual_seed(seed)
    figures = {name: torch.rand(stream.width, generator=generator, dtype=torch.float64) for name in stream.tensors}
    at_once, one_by_one = SuspectScan(stream), SuspectScan(stream)
    at_once.add(figures)
    names = list(figures)
    for place in torch.randperm(len(names), generator=generator).tolist():
        one_by_one.add({names[place]: figures[names[place]]})
        one_by_one.suspects(3)
    assert [site.name for site in one_by_one.sites()] == [site.name for site in at_once.sites()]
    assert all(torch.equal(a.score, b.score) for a, b in zip(one_by_one.sites(), at_once.sites(), strict=True))
    assert one_by_one.suspects(3) == at_once.suspects(3)


@pytest.mark.parametrize("stopped_after", [None, 1, 2])
def test_the_number_of_workers_does_not_change_the_suspects(stopped_after: int | None, tmp_path: Path) -> None:
    made = llama(tmp_path / "model", layers=4, shards=4)
    one = convert(made, tmp_path / "one", options("weights")).output
    several = made, tmp_path / "several", options("weights", workers=3)
    if stopped_after:
        with pytest.raises(StopError):
            convert(*several, progress=StopsAfter("convert", stopped_after))
    assert tree(convert(*several).output) == tree(one)


def test_auto_resumes_with_the_strategy_of_the_earlier_run(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    first = nursery.run("convert", model, "-o", "out", "--outliers", "weights", cwd=tmp_path)
    assert (first.code, "from the weights alone" in first.err) == (0, True)
    next((tmp_path / "out").glob("model-*2-of*")).unlink()
    again = nursery.run("convert", model, "-o", "out", "--outliers", "auto", "--json", cwd=tmp_path)
    assert again.code == 0, again.err
    assert json.loads(again.out)["settings"]["outliers"] == "weights"
    other = nursery.run("convert", model, "-o", "out", "--outliers", "none", cwd=tmp_path)
    assert other.code == 1
    assert "outliers 'weights'; this one has 'none'" in other.err


# The option


def test_a_misspelt_pattern_gives_a_warning(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    outcome = nursery.run("convert", model, "--outliers", "wieghts", cwd=tmp_path)
    assert outcome.code == 2
    assert "did you mean weights?" in outcome.err


def test_a_statistics_file_that_is_none_is_an_error(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    outcome = nursery.run("convert", model, "--outliers", "nothing.safetensors", cwd=tmp_path)
    assert outcome.code == 1
    assert "error: nothing.safetensors is not a file of outlier statistics" in outcome.err
    assert not (tmp_path / "model-int8").exists()


def test_a_text_without_a_model_to_run_is_refused(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    outcome = nursery.run("convert", model, "--outliers", "weights", "--text", "any.txt", cwd=tmp_path)
    assert outcome.code == 2
    assert "a text has no effect if outlier columns come from 'weights'" in outcome.err


def test_a_dry_run_counts_the_columns(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    dry = nursery.run("convert", model, "--outliers", "weights", "--dry-run", "--json", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert nursery.run("convert", model, "--outliers", "weights", "-o", "out", "-q", cwd=tmp_path).code == 0
    written = sum(file.stat().st_size for file in (tmp_path / "out/int8/outliers").rglob("*.safetensors"))
    assert json.loads(dry.out)["sidecar_bytes"] == written
