"""Pushing to the Hub, finished conversions and while they are made, against a stand-in that fails on request."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from support.hub_uploads import Fault, WritableHub
from support.program import Nursery, llama, tree
from support.pushing import (
    REPO,
    SHARDS,
    SOURCE,
    STREAM,
    TOKEN,
    User,
    assert_whole,
    files_in,
    local_conversion,
    refused,
    until_done,
    weights_here,
)

from int8cli.checkpoint.digest import git_sha1_of, sha256_of
from int8cli.checkpoint.hub.failures import OutdatedRequestError
from int8cli.checkpoint.hub.push_file import Commit, PushFile
from int8cli.checkpoint.hub.retries import Retries, RetryPolicy
from int8cli.checkpoint.hub.upload_failures import upload_error
from int8cli.checkpoint.hub.writable import PushTarget, WritableRepository
from int8cli.errors import DestinationError


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "model"
    return llama(directory, layers=2, hidden=64, intermediate=96, vocabulary=128, shards=3)


@pytest.fixture(scope="module")
def converted(published: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_conversion(published, nursery, tmp_path_factory.mktemp("converted"), "none")


@pytest.fixture(scope="module")
def with_columns(published: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_conversion(published, nursery, tmp_path_factory.mktemp("with-columns"), "weights")


@pytest.fixture
def hub(published: Path, tmp_path: Path) -> Iterator[WritableHub]:
    with WritableHub(tmp_path / "hub", {TOKEN: {"me"}}, part_bytes=20_000) as hub:
        hub.add_repo(SOURCE, published)
        yield hub


@pytest.fixture
def user(hub: WritableHub, nursery: Nursery, tmp_path: Path, converted: Path) -> User:
    return User(hub, nursery, tmp_path, converted)


# A finished conversion


def test_a_conversion_is_pushed_in_one_commit(user: User, converted: Path) -> None:
    outcome = user.push("--json")
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted)
    [commit] = user.hub.commits
    assert (commit.repo_id, commit.revision, commit.message) == (REPO, "main", "org/model in LLM.int8(), by int8cli")
    pushed = json.loads(outcome.out)
    assert pushed["schema"] == "int8cli.push/1"
    assert (pushed["repository"], pushed["revision"], pushed["new"]) == (REPO, "main", True)
    assert pushed["files"] == len(files_in(converted))
    assert pushed["bytes"] == sum(map(len, files_in(converted).values()))
    assert pushed["uploaded_bytes"] == user.hub.put_bytes > 0
    uploads = {f"int8/uploads/{shard.removesuffix('.safetensors')}.json" for shard in SHARDS}
    assert tree(user.output).keys() - tree(converted).keys() == {"int8/push.json", *uploads}


def test_what_is_there_is_not_pushed_again(user: User, converted: Path) -> None:
    assert user.push("-q").code == 0
    again = user.push("--json")
    assert again.code == 0, again.err
    assert_whole(user, converted)
    assert json.loads(again.out)["new"] is False
    assert json.loads(again.out)["uploaded_bytes"] == 0
    assert json.loads(again.out)["commit"] == user.hub.repo(REPO).commit
    shutil.rmtree(user.output / "int8/uploads")  # as in another copy of the directory
    assert user.push("-q").code == 0
    assert_whole(user, converted)


def test_the_storage_never_sees_the_token(user: User) -> None:
    assert user.push("-q").code == 0
    stored = [request for request in user.hub.requests if request.path.startswith("/storage/")]
    assert len(stored) > len(user.hub.put_objects)  # in parts
    assert {request.authorization for request in stored} == {None}


def test_a_downloaded_repository_verifies(user: User, published: Path) -> None:
    assert user.push("-q").code == 0
    shutil.copytree(user.hub.directory_of(REPO), user.home / "downloaded")
    outcome = user.run("verify", "downloaded", "--source", SOURCE)
    assert outcome.code == 0, outcome.out + outcome.err


def test_the_card_has_what_the_hub_reads(user: User) -> None:
    from huggingface_hub import ModelCard

    assert user.push("-q").code == 0
    data = ModelCard(user.hub.files_of(REPO)["README.md"].decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (SOURCE, "quantized")
    assert data["library_name"] == "transformers"
    assert {"int8", "bitsandbytes"} <= set(data["tags"])


def test_branch_message_and_visibility_are_chosen(user: User, converted: Path) -> None:
    outcome = user.push("--private", "--revision", "v2", "--commit-message", "first try")
    assert outcome.code == 0, outcome.err
    assert "out is now me/model-int8 at v2, commit " in outcome.out
    assert user.hub.repo(REPO).token == TOKEN
    assert user.hub.files_of(REPO) == {}
    assert user.hub.files_of(REPO, "v2") == files_in(converted)
    assert [(commit.revision, commit.message) for commit in user.hub.commits] == [("v2", "first try")]


def test_users_may_edit_the_card(user: User) -> None:
    user.has_converted()
    (user.output / "README.md").write_text("mine\n")
    assert user.push("-q").code == 0
    assert user.hub.files_of(REPO)["README.md"] == b"mine\n"


# Refusals


def test_a_token_is_needed(user: User) -> None:
    refused(user.push(HF_TOKEN=""), "error: me/model-int8: writing to the Hub needs a token", "Set HF_TOKEN")
    refused(user.push(HF_TOKEN="hf_wrong"), "401 Unauthorized: Invalid credentials", "one that may write there")
    assert user.hub.put_bytes == 0


@pytest.mark.parametrize("exists", [False, True])
def test_a_repository_of_others_is_refused(user: User, exists: bool) -> None:
    if exists:
        user.hub.new_repo("you/model")
    user.has_converted()
    refused(user.run("push", "out", "you/model"), "you/model: .*403 Forbidden", "one that may write there")
    assert user.hub.put_bytes == 0


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/", "me/mo del"])
def test_an_impossible_name_is_refused(user: User, name: str) -> None:
    user.has_converted()
    refused(user.run("push", "out", name), "is not the name of a repository on the Hub", "NAMESPACE/NAME")


def test_a_public_repository_is_no_private_one(user: User) -> None:
    user.hub.new_repo(REPO)
    refused(user.push("--private"), "me/model-int8 exists and is public", "make the repository private")
    assert user.hub.put_bytes == 0


@pytest.mark.parametrize("option", [[], ["--private"]])
def test_a_repository_that_somebody_else_creates_meanwhile_is_used(
    user: User, hub: WritableHub, converted: Path, option: list[str]
) -> None:
    def create(step: str, when: str) -> bool:
        if (step, when) == ("create", "before"):
            hub.new_repo(REPO)
        return False

    hub.watch = create
    outcome = user.push(*option)
    if option:
        refused(outcome, "me/model-int8 exists and is public", "make the repository private")
    else:
        assert_whole(user, converted)


def test_a_repository_with_another_model_is_refused(user: User) -> None:
    user.hub.new_repo(REPO, {"pytorch_model.bin": b"weights"})
    refused(user.push(), "holds another model: pytorch_model.bin", "Choose another place")
    refused(user.convert(*STREAM), "holds another model: pytorch_model.bin", "Choose another place")
    assert user.hub.put_bytes == 0


def test_a_source_is_not_replaced_by_its_conversion(user: User) -> None:
    """Its shards have the same names."""
    user.hub.new_repo(REPO, {"model-00001-of-00003.safetensors": b"weights"})
    refused(user.push(), "holds another model: model-00001-of-00003.safetensors", "Choose another place")
    assert user.hub.put_bytes == 0


def test_a_full_repository_is_refused_until_it_has_room(user: User, converted: Path) -> None:
    user.hub.new_repo(REPO)
    user.hub.limit(REPO, 1000)
    refused(user.push(), "model-00001.*does not take it: me/model-int8 has no storage left", "Make room there")
    user.hub.limit(REPO, 1 << 30)
    assert user.push("-q").code == 0
    assert_whole(user, converted)


@pytest.mark.parametrize("place", [4, -1])
def test_a_damaged_shard_is_not_pushed(user: User, place: int) -> None:
    user.has_converted()
    data = bytearray((user.output / SHARDS[1]).read_bytes())
    data[place] ^= 1
    (user.output / SHARDS[1]).write_bytes(data)
    refused(user.push(), f"{SHARDS[1]}: .* differs from what was written", "converts that shard again")
    assert user.hub.commits == []


def test_an_edited_config_is_not_pushed(user: User) -> None:
    user.has_converted()
    with (user.output / "config.json").open("a") as file:
        file.write("\n")
    refused(user.push(), "config.json differs from what was written", "Run the same convert command again")
    assert user.hub.commits == []


def test_an_unfinished_conversion_is_not_pushed(user: User) -> None:
    user.has_converted()
    (user.output / "int8/files.json").unlink()
    refused(user.push(), "the conversion is not finished", "Run the same convert command again")


@pytest.mark.parametrize("option", [["--private"], ["--no-keep-output"], ["--push-revision", "x"]])
def test_options_need_a_repository(user: User, option: list[str]) -> None:
    outcome = user.convert(*option)
    assert outcome.code == 2
    assert "without a repository" in outcome.err


# Bad days


def test_each_request_may_fail_once(user: User, converted: Path) -> None:
    for step in ("create", "batch", "preupload", "part", "complete", "verify", "yaml", "commit"):
        if step == "part":
            user.hub.fail(step, Fault(on="PUT", status=503))
        else:
            user.hub.fail(step, Fault(on="POST", status=503, headers={"Retry-After": "0"}))
    user.hub.fail("batch", Fault(on="POST", status=429, headers={"Retry-After": "0"}))
    outcome = user.push("--retry-for", "2m")
    assert outcome.code == 0, outcome.err
    assert "trying again" in outcome.err
    assert_whole(user, converted)


def test_dropped_connections_are_made_again(user: User, converted: Path) -> None:
    user.hub.fail("part", Fault(on="PUT", drop_after_bytes=100))
    user.hub.fail("commit", Fault(on="POST", stall_s=0.0))
    outcome = user.push()
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(user: User, converted: Path) -> None:
    user.hub.fail("commit", Fault(on="POST", after=True))
    outcome = user.push("--json")
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted)


@pytest.mark.parametrize(
    ("step", "method", "status", "words"),
    [
        ("part", "PUT", 403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"),
        ("part", "PUT", 400, b"<Error><Code>RequestTimeout</Code><Message>Not read from in time</Message></Error>"),
        ("commit", "POST", 412, b'{"error": "A commit has happened since. Please refresh and try again."}'),
        ("commit", "POST", 409, b'{"error": "Conflict"}'),
    ],
)
def test_a_request_that_came_too_late_is_made_anew(
    step: str, method: str, status: int, words: bytes, user: User, converted: Path
) -> None:
    """The signed address of an upload has expired, or somebody else has made a commit meanwhile."""
    user.hub.fail(step, Fault(on=method, status=status, body=words))
    outcome = user.push()
    assert outcome.code == 0, outcome.err
    assert f"the server answered {status}" in outcome.err
    assert_whole(user, converted)


@pytest.fixture
def _endpoint_here(hub: WritableHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT at the start: huggingface_hub 1.3 reads the address of a commit by it."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)


@pytest.mark.usefixtures("_endpoint_here")
@pytest.mark.parametrize(("status", "reason"), [(409, "Conflict"), (412, "Precondition Failed")])
def test_a_conflict_that_stays_is_an_error_soon(status: int, reason: str, hub: WritableHub, tmp_path: Path) -> None:
    """Nobody else writes to the repository, and it refuses each new commit: three hours of retries would not help."""
    waits, repository, file = at_once(hub, tmp_path)
    hub.fail("commit", Fault(on="POST", status=status, body=b'{"error": "The branch is locked"}', times=-1))
    with pytest.raises(DestinationError, match=rf"answered {status} {reason}: The branch is locked \(new") as found:
        repository.commit([file], "a card")
    assert found.value.hint is not None
    assert "Look at the repository's page" in found.value.hint
    assert len(waits) == 7
    hub.recover()
    assert repository.commit([file], "a card").made


@pytest.mark.usefixtures("_endpoint_here")
def test_a_conflict_with_others_who_go_on_writing_is_tried_again(hub: WritableHub, tmp_path: Path) -> None:
    """Each of two dozen attempts meets a commit of somebody else."""
    waits, repository, file = at_once(hub, tmp_path)
    hub.fail("commit", Fault(on="POST", status=412, times=24))

    def somebody_commits(step: str, when: str) -> bool:
        if step == "commit" and len(waits) < 24:
            theirs = tmp_path / str(len(waits))
            shutil.copytree(hub.directory_of(REPO), theirs)
            (theirs / "notes.txt").write_text(f"note {len(waits)}")
            hub.move_main(REPO, theirs)
        return False

    hub.watch = somebody_commits
    assert repository.commit([file], "a card").made
    assert len(waits) == 24
    assert hub.files_of(REPO) == {"README.md": b"# A model\n", "notes.txt": b"note 23"}


@pytest.mark.usefixtures("_endpoint_here")
def test_the_second_of_two_that_commit_the_same_finds_it_there(hub: WritableHub, tmp_path: Path) -> None:
    """The first one's commit is made at the moment of the second one's, which the Hub refuses."""
    _, first, file = at_once(hub, tmp_path)
    _, second, _ = at_once(hub, tmp_path)
    commits: list[Commit] = []
    begun: list[str] = []

    def the_first_commits(step: str, when: str) -> bool:
        if step == "commit" and not begun:
            begun.append(when)
            commits.append(first.commit([file], "a card"))
        return False

    hub.fail("commit", Fault(on="POST", status=412))
    hub.watch = the_first_commits
    commit = second.commit([file], "a card")
    assert not commit.made
    assert commits == [Commit(commit.oid, made=True)]
    assert len(hub.commits) == 1


def at_once(hub: WritableHub, home: Path) -> tuple[list[str], WritableRepository, PushFile]:
    """A repository that is tried again at once for three hours, what it waited for, and a file to commit."""
    waits: list[str] = []
    policy = RetryPolicy(first_pause_s=0.0, max_pause_s=0.0, patience_s=3 * 3600.0)
    target = PushTarget(
        REPO, endpoint=hub.endpoint, token=TOKEN, retry=policy, on_wait=lambda what, why, pause_s: waits.append(why)
    )
    if hub.repo(REPO) is None:
        hub.new_repo(REPO)
    card = home / "README.md"
    card.write_bytes(b"# A model\n")
    file = PushFile(card.name, card.stat().st_size, sha256_of(card), git_sha1_of(card), card)
    return waits, WritableRepository(target), file


def test_an_address_that_is_always_outdated_is_an_error_soon() -> None:
    made: list[int] = []

    def request() -> None:
        made.append(1)
        raise OutdatedRequestError("Request has expired")

    policy = RetryPolicy(first_pause_s=0.0, max_pause_s=0.0, patience_s=3 * 3600.0)
    with pytest.raises(DestinationError, match=r"a file: Request has expired \(new requests"):
        Retries(policy, "a file", Event(), translate=upload_error).call(request)
    assert len(made) == 8


def test_a_line_that_is_too_slow_for_the_storage_is_tried_again() -> None:
    """For as long as the patience: nobody's address has expired."""
    made: list[int] = []

    def request() -> None:
        made.append(1)
        if len(made) < 30:
            raise OutdatedRequestError("400 RequestTimeout", state=None)

    policy = RetryPolicy(first_pause_s=0.0, max_pause_s=0.0, patience_s=3 * 3600.0)
    Retries(policy, "a file", Event(), translate=upload_error).call(request)
    assert len(made) == 30


def test_a_storage_that_refuses_is_an_error(user: User) -> None:
    user.hub.fail("part", Fault(on="PUT", status=403, body=b"<Error><Code>AccessDenied</Code></Error>", times=-1))
    assert user.push().code == 1


@pytest.mark.parametrize("step", ["preupload", "batch", "commit"])
def test_an_account_without_storage_left_is_told_to_make_room(user: User, step: str, converted: Path) -> None:
    """The Hub says so with the status of a token that may not write."""
    words = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
    user.hub.fail(step, Fault(on="POST", status=403, headers={"X-Error-Message": words}, times=-1))
    refused(user.push(), "403 Forbidden: Private repository storage limit reached", "Make room there")
    user.hub.recover()
    assert user.push("-q").code == 0
    assert_whole(user, converted)


def test_patience_ends(user: User) -> None:
    user.hub.fail("batch", Fault(on="POST", status=503, times=-1))
    refused(user.push("--retry-for", "0s"), "me/model-int8: failed .*503", "Run the same command again")


def test_a_token_that_expires_is_an_error_and_a_new_one_goes_on(user: User, converted: Path) -> None:
    def expire(step: str, when: str) -> bool:
        if step == "complete":
            user.hub.tokens.pop(TOKEN, None)
        return False

    user.hub.watch = expire
    refused(user.push(), "401 Unauthorized: Invalid credentials", "set HF_TOKEN")
    assert user.hub.put_bytes > 0
    assert user.hub.commits == []
    user.hub.watch = lambda step, when: False
    user.hub.tokens["hf_Renewed"] = {"me"}
    assert user.push("-q", HF_TOKEN="hf_Renewed").code == 0
    assert_whole(user, converted)


def test_a_push_killed_at_any_step_goes_on(user: User, converted: Path) -> None:
    user.has_converted()
    assert until_done(user, lambda: user.start("push", "out", REPO, "-q"), every=3) > 8
    assert_whole(user, converted)


# While it is converted


def test_shards_go_to_the_hub_as_they_are_finished(user: User, with_columns: Path) -> None:
    most = 0

    def look(step: str, when: str) -> bool:
        nonlocal most
        most = max(most, len(weights_here(user.output)))
        return False

    user.hub.watch = look
    outcome = user.convert(*STREAM, "--outliers", "weights")
    assert outcome.code == 0, outcome.err
    assert_whole(user, with_columns)
    assert weights_here(user.output) == []
    assert 2 <= most <= 4  # two shards with sidecars: one is uploaded while the next is converted
    assert f"pushed to {REPO}: " in outcome.err
    assert user.hub.bytes_sent(SHARDS[0]) > 0


def test_shards_may_stay(user: User, converted: Path) -> None:
    outcome = user.convert("--push-to-hub", REPO, "--commit-message", "all at once", "--private")
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted)
    assert files_in(user.output) == files_in(converted)
    assert user.hub.commits[0].message == "all at once"
    assert user.hub.repo(REPO).token == TOKEN


def test_what_was_converted_before_is_pushed_and_removed(user: User, converted: Path) -> None:
    user.has_converted()
    assert user.convert(*STREAM, "-q").code == 0
    assert_whole(user, converted)
    assert weights_here(user.output) == []


def test_a_streamed_conversion_killed_at_any_step_goes_on(user: User, converted: Path) -> None:
    command = ("convert", SOURCE, "-o", "out", "--outliers", "none", *STREAM, "-q")
    assert until_done(user, lambda: user.start(*command)) > 8
    assert_whole(user, converted)
    assert weights_here(user.output) == []


def test_a_finished_one_is_known(user: User, converted: Path) -> None:
    assert user.convert(*STREAM, "-q").code == 0
    outcome = user.convert(*STREAM)
    assert outcome.code == 0, outcome.err
    assert "resuming: 3 of 3 shards already converted" in outcome.err
    assert f"already in {REPO}" in outcome.err
    assert_whole(user, converted)


def some_uploaded(user: User) -> None:
    """Have the first shard at the Hub alone, the others not, and no commit: the token expires after the first."""
    puts = 0

    def refuse_later(step: str, when: str) -> bool:
        nonlocal puts
        puts += step == "verify" and when == "after"
        if puts == 1:
            user.hub.tokens.pop(TOKEN, None)
        return False

    user.hub.watch = refuse_later
    assert user.convert(*STREAM, "-q").code == 1
    user.hub.watch = lambda step, when: False
    user.hub.tokens[TOKEN] = {"me"}
    assert not (user.output / SHARDS[0]).exists()


def test_status_and_verify_say_where_shards_are(user: User) -> None:
    some_uploaded(user)
    status = json.loads(user.run("status", "out", "--json").out)
    assert (status["state"], status["uploaded_to"], status["shards_uploaded"]) == ("unfinished", REPO, 1)
    assert status["shards_finished"] >= 1
    assert f"uploaded  1 of 3 to {REPO}, not committed yet; 1 are not here any more" in user.run("status", "out").out
    assert user.convert(*STREAM, "-q").code == 0
    refused(
        user.run("verify", "out"), f"3 of 3 shards are not here: they were uploaded to {REPO}", f"Download {REPO} into"
    )
    refused(user.run("dequantize", "out", "-o", "floats"), "3 of 3 shards are not here", f"Download {REPO} into")
    shown = user.run("status", "out").out
    commit = user.hub.repo(REPO).commit
    assert f"uploaded  3 of 3 to {REPO}, commit {commit[:12]}; 3 are not here any more" in shown
    assert f"next      download {REPO}, then int8cli verify the copy" in shown


def test_a_push_that_lacks_its_commit_is_not_finished(user: User, converted: Path) -> None:
    user.hub.fail("commit", Fault(on="POST", status=403))
    assert user.convert(*STREAM, "-q").code == 1
    status = json.loads(user.run("status", "out", "--json").out)
    assert (status["state"], status["shards_removed"], status["commit"]) == ("finished", 3, None)
    assert "next      the same int8cli convert command again: the push is not finished" in user.run("status", "out").out
    refused(user.run("verify", "out"), "3 of 3 shards are not here", "the push is not finished")
    assert user.convert(*STREAM, "-q").code == 0
    assert_whole(user, converted)


def test_uploaded_shards_are_not_left_behind(user: User) -> None:
    some_uploaded(user)
    refused(
        user.convert(),
        f"1 of 3 shards are not here: they were uploaded to {REPO}",
        "--push-to-hub or --push-to resumes",
    )
    refused(user.convert("--part", "1/2"), f"1 of 3 shards are not here: they were uploaded to {REPO}", "--push-to-hub")
    other = user.convert("--push-to-hub", "me/other", "--no-keep-output")
    refused(other, f"shards of {SOURCE} were uploaded to {REPO} and removed here", f"Push to {REPO} to continue")


def test_shards_that_the_hub_lost_are_converted_again(user: User, converted: Path) -> None:
    some_uploaded(user)
    user.hub.collect_garbage(REPO)
    user.hub.put_objects.clear()
    outcome = user.convert(*STREAM)
    assert outcome.code == 0, outcome.err
    assert f"{SHARDS[0]}: {REPO} does not have it any more" in outcome.err
    assert_whole(user, converted)


def test_starting_over_sends_nothing_twice(user: User, converted: Path) -> None:
    some_uploaded(user)
    assert user.convert(*STREAM, "--overwrite", "-q").code == 0
    assert_whole(user, converted)


def test_a_repository_that_is_refused_ends_the_run_before_the_work(user: User) -> None:
    refused(user.convert("--push-to-hub", "you/model"), "you/model: .*403", "may write there")
    assert weights_here(user.output) == []


def test_the_room_for_a_few_shards_is_enough(user: User, converted: Path) -> None:
    """The plan counts two output shards: one is uploaded while the next is converted."""
    whole, few = (json.loads(user.convert("--dry-run", "--json", *more).out) for more in ((), STREAM))
    outputs = sorted((converted / shard).stat().st_size for shard in SHARDS)
    [of_all], [of_two] = whole["needs"]["disks"], few["needs"]["disks"]
    assert of_all["bytes"] - of_two["bytes"] == outputs[0]


# The library


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of httpx2, about huggingface_hub
def test_the_library_pushes(user: User, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    import int8cli

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", user.hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    user.has_converted()
    pushed = int8cli.push(user.output, REPO, int8cli.PushOptions(commit_message="by a program"))
    assert (pushed.new, pushed.repository) == (True, REPO)
    assert_whole(user, converted)
    with pytest.raises(int8cli.Int8cliError, match="is not a conversion"):
        int8cli.push(user.home, REPO)


def test_records_of_uploads_hold_digests_alone(user: User, converted: Path) -> None:
    assert user.push("-q").code == 0
    for shard in SHARDS:
        record = json.loads((user.output / f"int8/uploads/{shard.removesuffix('.safetensors')}.json").read_text())
        assert record["schema"] == "int8cli.upload/1"
        assert record["repository"] == REPO
        assert [file["sha256"] for file in record["files"]] == [
            hashlib.sha256((converted / file["file"]).read_bytes()).hexdigest() for file in record["files"]
        ]
