"""What a server answers in the place of the Hub: status, headers and body of any request, changed at will."""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

from int8cli.checkpoint.hub import HubOptions, HubSource, RetryPolicy
from torture.fuzzing import Run, Target, WrongResultError
from torture.fuzzing.mutations import change_json

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "tokenizer_config.json": b'{"version": "1.0"}',
    "model.safetensors": bytes(range(256)) * 4,
}
_SMALL = ("config.json", "tokenizer_config.json")
_QUICK = RetryPolicy(attempts=2, first_pause_s=0.001, max_pause_s=0.001)
_Answer = tuple[int, dict[str, str], bytes]


class _Server(http.server.ThreadingHTTPServer):
    """Answers as the Hub does, but for the requests that have an answer of their own in `odd`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.odd: dict[tuple[str, str], _Answer] = {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that hangs up is none of ours."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = "" if self.path.startswith("/api/") else self.path.rpartition("/")[2]
        status, headers, body = self.server.odd.get((self.command, file)) or self._right(file)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(*(text.encode("latin-1", "replace").decode("latin-1") for text in (name, value)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True

    def _right(self, file: str) -> _Answer:
        if not file or file not in _FILES:
            return 200, {}, _api().encode()
        data = _FILES[file]
        headers = _right_headers(file)
        asked = (self.headers.get("Range") or "").removeprefix("bytes=")
        if not asked:
            return 200, headers, data
        first, _, last = asked.partition("-")
        end = min(len(data), int(last) + 1 if last else len(data))
        return 206, {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(data)}"}, data[int(first) : end]


def _api() -> str:
    return json.dumps({"id": "org/m", "sha": _COMMIT, "siblings": [{"rfilename": name} for name in _FILES]})


def _right_headers(file: str) -> dict[str, str]:
    data = _FILES[file]
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    etag = hashlib.sha256(data).hexdigest() if file.endswith("safetensors") else blob
    return {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT}


def _seed(method: str, file: str) -> bytes:
    headers = _right_headers(file) if file else {}
    headers |= {"Content-Length": str(len(_FILES.get(file, _api().encode())))}
    body = _FILES[file].decode("latin-1") if file else _api()
    return json.dumps([{"method": method, "file": file, "status": 200, "headers": headers, "body": body}]).encode()


def _answers(data: bytes) -> dict[tuple[str, str], _Answer]:
    """The answers that an input describes, as far as it does."""
    found: dict[tuple[str, str], _Answer] = {}
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):
        return found
    for each in described if isinstance(described, list) else ():
        if isinstance(each, dict):
            status, headers = each.get("status"), each.get("headers")
            status = status if isinstance(status, int) and 200 <= status < 600 else 200
            headers = headers if isinstance(headers, dict) else {}
            plain = {_in_a_line(name): _in_a_line(value) for name, value in headers.items()}
            body = str(each.get("body", "")).encode("utf-8" if each.get("utf8") else "latin-1", "replace")
            found[str(each.get("method")), str(each.get("file"))] = (status, plain, body)
    return found


def _in_a_line(value: Any) -> str:
    return str(value).replace("\r", " ").replace("\n", " ")[:1000] or "x"


def _hub(scratch: Path) -> tuple[list[bytes], Run]:
    server = _Server()
    options = HubOptions(
        scratch / "in",
        endpoint=f"http://127.0.0.1:{server.server_port}",
        cache_dir=scratch / "cache",
        retry=_QUICK,
        timeout_s=0.3,
    )

    def run(data: bytes) -> None:
        server.odd = _answers(data)
        shutil.rmtree(scratch / "in", ignore_errors=True)
        source = HubSource("org/m", None, options)
        try:
            # A server may ask for a pause of up to ten minutes, and gets it.
            with patch("int8cli.checkpoint.hub.failures._LONGEST_WAIT_S", 0.01):
                _read_all(source, server.odd)
        finally:
            source.close()

    requests = [("GET", ""), *((method, file) for file in _FILES for method in ("HEAD", "GET"))]
    return [b"[]", *(_seed(*each) for each in requests if each[0] == "HEAD" or not each[1])], run


def _read_all(source: HubSource, odd: dict[tuple[str, str], _Answer]) -> None:
    """Every file, in the ways that it is read. A small one whose digest is known is the one that was published."""
    for name in source.list_files():
        with source.fetch(name) as local:
            fetched = local.path.read_bytes()
        with source.open(name) as file:
            opened = file.read(1 << 20)
        if name in _SMALL and ("HEAD", name) not in odd and {fetched, opened} != {_FILES[name]}:
            raise WrongResultError("other bytes are taken for a file whose digest is known")


HUB_TARGETS = (Target("hub", _hub, change_json),)
