"""Conversions in parts that push: parts upload what they convert, and the process that concludes commits it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_uploads import WritableHub
from support.program import Nursery, Outcome, llama, tree
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


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("published") / "model", shards=3)


@pytest.fixture(scope="module")
def converted(published: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_conversion(published, nursery, tmp_path_factory.mktemp("converted"), "none")


@pytest.fixture(scope="module")
def with_columns(published: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_conversion(published, nursery, tmp_path_factory.mktemp("with-columns"), "weights")


@pytest.fixture
def user(published: Path, converted: Path, nursery: Nursery, tmp_path: Path) -> Iterator[User]:
    with WritableHub(tmp_path / "hub", {TOKEN: {"me"}}, part_bytes=20_000) as hub:
        hub.add_repo(SOURCE, published)
        yield User(hub, nursery, tmp_path, converted)


def part(user: User, number: int, parts: int, *more: str, **changes: str) -> Outcome:
    return user.convert("--part", f"{number}/{parts}", *STREAM, *more, **changes)


# From the Hub


@pytest.mark.parametrize("outliers", ["none", "weights"])
def test_parts_read_the_hub(outliers: str, user: User, converted: Path, with_columns: Path) -> None:
    for number in (3, 1, 2):
        outcome = user.convert("--part", f"{number}/3", "-q", "--outliers", outliers)
        assert outcome.code == 0, outcome.err
    assert tree(user.output) == tree(converted if outliers == "none" else with_columns)


# To the Hub


@pytest.mark.parametrize("outliers", ["none", "weights"])
def test_parts_upload_and_the_last_process_commits(
    outliers: str, user: User, converted: Path, with_columns: Path
) -> None:
    for number in (2, 1, 3):
        outcome = part(user, number, 3, "--outliers", outliers)
        assert outcome.code == 0, outcome.err
        assert weights_here(user.output) == []
    assert "Next, to publish them:\n  the same command with --finish in place of --part" in outcome.out
    assert user.hub.commits == []
    assert set(user.hub.files_of(REPO)) <= {".gitattributes"}
    outcome = user.convert("--finish", *STREAM, "--outliers", outliers)
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted if outliers == "none" else with_columns)
    assert user.convert("--finish", *STREAM, "--outliers", outliers, "-q").code == 0
    assert_whole(user, converted if outliers == "none" else with_columns)


def test_a_part_says_that_a_commit_is_to_be_made(user: User) -> None:
    documents = [json.loads(part(user, number, 2, "--json").out) for number in (1, 2)]
    assert [(each["finished"], each["to_publish"]) for each in documents] == [(False, True), (True, True)]
    status = json.loads(user.run("status", "out", "--json").out)
    assert (status["uploaded_to"], status["shards_uploaded"], status["shards_removed"]) == (REPO, 3, 3)


def test_parts_at_the_same_time_and_twice(user: User, converted: Path) -> None:
    """What two processes send at the same moment, the repository gets twice; it is the same."""
    command = ("convert", SOURCE, "-o", "out", "--outliers", "none", *STREAM, "-q", "--part")
    children = [user.start(*command, f"{number}/3") for number in (1, 2, 3, 1, 3)]
    outcomes = [child.wait() for child in children]
    assert [outcome.code for outcome in outcomes] == [0] * 5, [outcome.err for outcome in outcomes]
    assert user.convert("--finish", *STREAM, "-q").code == 0
    assert user.hub.files_of(REPO) == files_in(converted)
    assert len(user.hub.commits) == 1
    assert weights_here(user.output) == []


def test_a_part_killed_at_any_step_goes_on(user: User, converted: Path) -> None:
    command = ("convert", SOURCE, "-o", "out", "--outliers", "none", *STREAM, "-q")
    assert part(user, 2, 2, "-q").code == 0
    assert until_done(user, lambda: user.start(*command, "--part", "1/2"), every=3) > 3
    assert user.hub.commits == []
    assert until_done(user, lambda: user.start(*command, "--finish"), every=3) > 3
    assert_whole(user, converted)


def test_the_conclusion_uploads_what_parts_have_not(user: User, converted: Path) -> None:
    assert user.convert("--part", "1/2", "-q").code == 0
    assert part(user, 2, 2, "-q").code == 0
    outcome = user.convert("--finish", "--push-to-hub", REPO)
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted)
    assert weights_here(user.output)


def test_shards_may_stay(user: User, converted: Path) -> None:
    for more in (["--part", "1/2"], ["--part", "2/2"], ["--finish", "--commit-message", "all parts"]):
        outcome = user.convert("--push-to-hub", REPO, *more, "-q")
        assert outcome.code == 0, outcome.err
    assert_whole(user, converted)
    assert files_in(user.output) == files_in(converted)
    assert user.hub.commits[0].message == "all parts"


def test_a_plain_run_goes_on_where_parts_stopped(user: User, converted: Path) -> None:
    assert part(user, 2, 3, "-q").code == 0
    outcome = user.convert(*STREAM, "-q")
    assert outcome.code == 0, outcome.err
    assert_whole(user, converted)


def test_nothing_is_committed_while_shards_are_missing(user: User) -> None:
    assert part(user, 1, 2, "-q").code == 0
    sent = len(user.hub.put_objects)
    refused(user.convert("--finish", *STREAM), "of 3 shards are not converted: model-", "Run the parts that have not")
    assert user.hub.commits == []
    assert len(user.hub.put_objects) == sent
    refused(user.convert("--part", "2/2"), f"shards are not here: they were uploaded to {REPO}", "--push-to-hub")
    other = user.convert("--finish", "--push-to-hub", "me/other")
    refused(other, f"were uploaded to {REPO} and removed here", f"Push to {REPO} to continue")


def test_shards_that_the_hub_lost_are_missing(user: User, converted: Path) -> None:
    for number in (1, 2):
        assert part(user, number, 2, "-q").code == 0
    user.hub.collect_garbage(REPO)
    user.hub.put_objects.clear()
    outcome = user.convert("--finish", *STREAM)
    refused(outcome, "3 of 3 shards are not converted", "Run the parts")
    assert f"{SHARDS[0]}: {REPO} does not have it any more" in outcome.err
    for number in (1, 2):
        assert part(user, number, 2, "-q").code == 0
    assert user.convert("--finish", *STREAM, "-q").code == 0
    assert_whole(user, converted)


def test_a_token_that_expires_stops_its_part_only(user: User, converted: Path) -> None:
    user.hub.tokens["hf_Expired"] = {"me"}

    def expire(step: str, when: str) -> bool:
        if step == "complete":
            user.hub.tokens.pop("hf_Expired", None)
        return False

    user.hub.watch = expire
    refused(part(user, 1, 1, HF_TOKEN="hf_Expired"), "401 Unauthorized: Invalid credentials", "set HF_TOKEN")
    for number in (2, 1):
        assert part(user, number, 2, "-q").code == 0
    assert user.convert("--finish", *STREAM, "-q").code == 0
    assert_whole(user, converted)


def test_a_repository_of_others_is_refused_by_every_part(user: User) -> None:
    for which in (["--part", "1/2"], ["--finish"]):
        refused(user.convert("--push-to-hub", "you/model", *which), "you/model: .*403", "may write there")
    assert weights_here(user.output) == []


def test_a_conversion_in_parts_is_pushed_when_all_have_ended(user: User, converted: Path) -> None:
    assert user.convert("--part", "1/2", "-q").code == 0
    refused(user.push(), "the conversion is not finished", "Run the same convert command again")
    assert user.convert("--part", "2/2", "-q").code == 0
    assert user.push("-q").code == 0
    assert_whole(user, converted)
