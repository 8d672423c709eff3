"""Answers that a real Hub does not give: proxies, login pages, odd headers. Each ends in the file or in our error."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from int8cli.checkpoint.hub import HubOptions, HubSource, RetryPolicy
from int8cli.errors import AccessDeniedError, DigestMismatchError, Int8cliError, TransferError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "tiny"}'
WORDS = b'{"version": "1.0"}'
SHARD = bytes(range(256)) * 40
FILES = {"config.json": CONFIG, "tokenizer_config.json": WORDS, "model.safetensors": SHARD}
PAGE = "<html>Dienst nicht verfügbar</html>".encode("latin-1")
QUICK = RetryPolicy(attempts=3, first_pause_s=0.001, max_pause_s=0.002)

# The answer in place of the right one, as status, headers and body; or None.
Odd = Callable[[str, str, int], tuple[int, dict[str, str], bytes] | None]


class OddHub:
    """A Hub of one repository. `odd(method, file, times asked before)` may replace an answer; "" is the API."""

    def __init__(self) -> None:
        self.odd: Odd = lambda method, file, before: None
        self.asked: dict[tuple[str, str], int] = {}
        self.tokens: list[tuple[str, str, str | None]] = []


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub() -> Iterator[OddHub]:
    hub = OddHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            file = "" if self.path.startswith("/api/") else self.path.rpartition("/")[2]
            before = hub.asked.get((self.command, file), 0)
            hub.asked[self.command, file] = before + 1
            hub.tokens.append((self.command, file, self.headers.get("Authorization")))
            status, headers, body = hub.odd(self.command, file, before) or self.right(file)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def right(self, file: str) -> tuple[int, dict[str, str], bytes]:
            if not file:
                siblings = [{"rfilename": name} for name in FILES]
                return 200, {}, json.dumps({"id": "org/m", "sha": COMMIT, "siblings": siblings}).encode()
            data = FILES[file]
            etag = hashlib.sha256(data).hexdigest() if file.endswith("safetensors") else blob(data)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            asked = (self.headers.get("Range") or "").removeprefix("bytes=")
            if not asked:
                return 200, headers, data
            first, _, last = asked.partition("-")
            end = min(len(data), int(last) + 1 if last else len(data))
            return 206, {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(data)}"}, data[int(first) : end]

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def source(hub: OddHub, tmp_path: Path) -> HubSource:
    options = HubOptions(
        tmp_path / "in",
        endpoint=hub.endpoint,  # type: ignore[attr-defined]
        cache_dir=tmp_path / "cache",
        retry=QUICK,
        timeout_s=5.0,
    )
    return HubSource("org/m", None, options)


def everything(source: HubSource) -> dict[str, bytes]:
    """All files, each read in the usual way."""
    found = {}
    for name in source.list_files():
        with source.fetch(name) as local:
            found[name] = local.path.read_bytes()
        if name.endswith(".json"):
            with source.open(name) as file:
                assert file.read() == found[name]
    return found


def once(kind: tuple[str, str], answer: tuple[int, dict[str, str], bytes]) -> Odd:
    return lambda method, file, before: answer if (method, file) == kind and not before else None


def always(kind: tuple[str, str], answer: tuple[int, dict[str, str], bytes]) -> Odd:
    return lambda method, file, before: answer if (method, file) == kind else None


API, HEAD, GET = ("GET", ""), ("HEAD", "tokenizer_config.json"), ("GET", "tokenizer_config.json")
RIGHT = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob(WORDS)}"'}


def test_a_model_on_the_hub_is_read(source: HubSource) -> None:
    assert everything(source) == FILES


# Pages, and pauses


@pytest.mark.parametrize("kind", [API, HEAD, GET, ("GET", "model.safetensors")])
@pytest.mark.parametrize(
    "page",
    [PAGE, b"[1]", b'{"error": 5, "errors": [5]}', b"[" * 100_000, b"\xff\xfe", b""],
    ids=["latin-1", "list", "other types", "deep", "no text", "empty"],
)
def test_any_page_with_status_503_is_tried_again(
    kind: tuple[str, str], page: bytes, hub: OddHub, source: HubSource
) -> None:
    hub.odd = once(kind, (503, {"Content-Type": "text/html; charset=iso-8859-1"}, page))
    assert everything(source) == FILES


@pytest.mark.parametrize(
    "pause",
    [
        *(f"Wed, 21 Oct {end}" for end in ("2015 07:28:00 GMT", "2015 07:28:00 -0000", "99999 07:28:00 GMT")),
        *("soon", "-5", "\xb2", "0.5", "1e9", ",", "", "Wed, 99 Foo 2015"),
    ],
)
def test_any_retry_after_header_is_accepted(pause: str, hub: OddHub, source: HubSource) -> None:
    hub.odd = once(GET, (503, {"Retry-After": pause}, b""))
    assert everything(source) == FILES


# Sizes


@pytest.mark.parametrize("size", ["-5", "many", "\xb2", "9" * 30, "0x10", "1.5"])
def test_an_invalid_size_is_an_error_or_is_requested_again(size: str, hub: OddHub, source: HubSource) -> None:
    hub.odd = always(HEAD, (200, {**RIGHT, "X-Linked-Size": size}, WORDS))
    ends_in_the_files_or_an_error(source)


@pytest.mark.parametrize("length", [0, len(WORDS) - 1, len(WORDS) + 1, 10**9])
def test_a_size_that_is_wrong_is_an_error(length: int, hub: OddHub, source: HubSource) -> None:
    hub.odd = always(HEAD, (200, {**RIGHT, "X-Linked-Size": str(length)}, WORDS))
    with pytest.raises(Int8cliError, match=r"tokenizer_config\.json"):
        everything(source)


@pytest.mark.parametrize("total", ["-1", "many", "*", "\xb2", "9" * 30, "1", ""])
def test_any_total_in_a_content_range_ends_in_the_files_or_an_error(total: str, hub: OddHub, source: HubSource) -> None:
    stated = {**RIGHT, "Content-Range": f"bytes 0-{len(CONFIG) - 1}/{total}", "ETag": f'"{blob(CONFIG)}"'}
    hub.odd = always(("GET", "config.json"), (206, stated, CONFIG))
    ends_in_the_files_or_an_error(source)


def ends_in_the_files_or_an_error(source: HubSource) -> None:
    try:
        found = everything(source)
    except Int8cliError:
        return
    assert found == FILES


# Redirects, and the API


@pytest.mark.parametrize("kind", [API, HEAD, GET])
@pytest.mark.parametrize("location", ["http://[", "http://", "ftp://x/y", "http://\xe4:x/", "//", ":", "http://a b/"])
def test_a_redirect_without_address_is_an_error(
    kind: tuple[str, str], location: str, hub: OddHub, source: HubSource
) -> None:
    hub.odd = always(kind, (302, {**RIGHT, "Location": location}, b""))
    if kind == HEAD:  # what it says of the file is enough, wherever it leads
        ends_in_the_files_or_an_error(source)
    else:
        with pytest.raises(Int8cliError):
            everything(source)


SHARD_RIGHT = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(SHARD).hexdigest()}"'}
NAMED = {"X-Linked-Etag": SHARD_RIGHT["ETag"], "X-Linked-Size": str(len(SHARD))}
STORED = (200, {"ETag": '"5f-abc"', "Content-Length": str(len(SHARD))}, SHARD)


@pytest.mark.parametrize("location", ["/storage/model", "{endpoint}/storage/model", "http://elsewhere.invalid/model"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_digest_in_the_redirect_wins_over_that_of_the_storage(
    location: str, ends: bool, hub: OddHub, source: HubSource
) -> None:
    redirect = {"X-Repo-Commit": COMMIT, "Location": location.format(endpoint=hub.endpoint), **NAMED}  # type: ignore[attr-defined]
    renamed = {"Location": "/new/name/resolve/x/model.safetensors"}

    def odd(method: str, file: str, before: int) -> tuple[int, dict[str, str], bytes] | None:
        if method == "HEAD" and file == "model.safetensors":
            return (307, renamed, b"") if ends and not before else (302, redirect, b"")
        return STORED if file == "model" else None

    hub.odd = odd
    with source.fetch("model.safetensors") as local:
        assert local.sha256 == hashlib.sha256(SHARD).hexdigest()


def test_a_redirect_to_another_server_is_followed_without_the_token(hub: OddHub, tmp_path: Path) -> None:
    """A mirror that sends its clients to the Hub for what it does not have."""
    there = hub.endpoint.replace("127.0.0.1", "localhost")  # type: ignore[attr-defined]
    away = (302, {"Location": f"{there}/org/m/resolve/x/model.safetensors"}, b"")
    hub.odd = once(("HEAD", "model.safetensors"), away)
    options = HubOptions(tmp_path / "in", endpoint=hub.endpoint, token="hf_secret", retry=QUICK)  # type: ignore[attr-defined]
    with HubSource("org/m", None, options).fetch("model.safetensors") as local:
        assert local.sha256 == hashlib.sha256(SHARD).hexdigest()
    heads = [token for method, file, token in hub.tokens if (method, file) == ("HEAD", "model.safetensors")]
    assert heads == ["Bearer hf_secret", None]


def test_redirects_in_a_circle_are_an_error(hub: OddHub, source: HubSource) -> None:
    hub.odd = always(HEAD, (302, {"Location": f"/x/{HEAD[1]}"}, b""))
    with pytest.raises(TransferError, match=rf"{HEAD[1]}: .*redirects without end"):
        everything(source)


@pytest.mark.parametrize(
    "answer",
    ["", "5", "null", "[]", "{}", '{"sha": 5}', '{"sha": "../x", "siblings": []}', f'{{"sha": "{COMMIT}"}}']
    + [f'{{"sha": "{COMMIT}", "siblings": {each}}}' for each in ("5", "{}", "[5]", "[{}]", '[{"rfilename": 5}]')]
    + ["[" * 100_000, "<html>Please log in</html>", '{"sha": "\\ud800", "siblings": []}'],
    ids=lambda answer: answer[:40],
)
def test_an_api_with_other_answers_is_not_a_hub(answer: str, hub: OddHub, source: HubSource) -> None:
    hub.odd = always(API, (200, {}, answer.encode()))
    with pytest.raises(TransferError, match="does not answer like a Hub"):
        source.resolve()


@pytest.mark.parametrize("token", ["hf_ä", "hf_\u200bx"])
def test_an_invalid_token_is_reported(token: str, hub: OddHub, tmp_path: Path) -> None:
    options = HubOptions(tmp_path / "in", endpoint=hub.endpoint, token=token, retry=QUICK)  # type: ignore[attr-defined]
    with pytest.raises(AccessDeniedError, match="token") as caught:
        HubSource("org/m", None, options).resolve()
    assert token not in str(caught.value)
    assert not hub.asked


# Bytes of small files


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_other_bytes_under_the_right_etag_are_fetched_once_more(name: str, hub: OddHub, source: HubSource) -> None:
    changed = FILES[name].replace(b"i", b"o")
    hub.odd = once(("GET", name), (200, {**RIGHT, "ETag": f'"{blob(FILES[name])}"'}, changed))
    assert everything(source) == FILES


@pytest.mark.parametrize("read", [lambda source, name: source.open(name), lambda source, name: fetch(source, name)])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_other_bytes_are_not_accepted(
    name: str, read: Callable[[HubSource, str], object], hub: OddHub, source: HubSource, tmp_path: Path
) -> None:
    changed = FILES[name].replace(b"i", b"o")
    hub.odd = always(("GET", name), (200, {**RIGHT, "ETag": f'"{blob(FILES[name])}"'}, changed))
    with pytest.raises(DigestMismatchError, match=name):
        read(source, name)
    assert not [path for path in (tmp_path / "in").rglob("*") if path.is_file()]


def test_a_login_page_is_not_a_file(hub: OddHub, source: HubSource) -> None:
    hub.odd = lambda method, file, before: (200, {"Content-Type": "text/html"}, PAGE) if file == GET[1] else None
    with pytest.raises(TransferError, match="does not answer like a Hub"):
        fetch(source, GET[1])


@pytest.mark.parametrize("etag", ['W/"abc"', '"d41d8cd98f00b204e9800998ecf8427e"', '"5f-abc"', None])
def test_other_servers_have_other_etags(etag: str | None, hub: OddHub, source: HubSource) -> None:
    headers = {"X-Repo-Commit": COMMIT, **({} if etag is None else {"ETag": etag})}
    hub.odd = lambda method, file, before: (200, headers, WORDS) if file == GET[1] else None
    assert fetch(source, GET[1]) == WORDS


def fetch(source: HubSource, name: str) -> bytes:
    with source.fetch(name) as local:
        return local.path.read_bytes()


@pytest.mark.parametrize("status", [200, 403])
def test_an_answer_without_end_is_not_read_whole(
    status: int, hub: OddHub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(method: str, file: str, before: int) -> tuple[int, dict[str, str], bytes] | None:
        return (status, {"Content-Length": str(1 << 40)}, b" " * (1 << 17)) if not file else None

    hub.odd = endless
    monkeypatch.setattr("int8cli.checkpoint.hub.repository._ANSWER_LIMIT_BYTES", 1 << 16)
    with pytest.raises(Int8cliError) as caught:
        source.list_files()
    assert isinstance(caught.value, TransferError if status == 200 else AccessDeniedError)
    assert caught.value.hint
