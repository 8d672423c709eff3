"""A small Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client, that fails on request.

    with HubStandIn() as hub:
        hub.add_repo("org/name", directory)
        hub.fail("model.safetensors", Fault(drop_after_bytes=1000, times=2))
        ...  # HF_ENDPOINT=hub.endpoint, or HubOptions(endpoint=hub.endpoint)
        assert hub.bytes_sent("model.safetensors") == 5000

Files in LFS (*.safetensors, *.bin and the like) have their sha256 as etag and are redirected to a second server of
another name, as the Hub redirects to its CDN; all others have their git hash and are served at once. Every request is
in `hub.requests`, with the bytes of the body that were sent.
"""

import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self, cast
from urllib.parse import unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
_PIECE_BYTES = 16 << 10
Cdn = Literal["another host", "another port", "same address"]


@dataclass
class Fault:
    """What goes wrong, in the next `times` requests for a file's bytes (`on="HEAD"`: for its metadata).

    A request that asks for less than `drop_after_bytes`, or whose range does not hold `corrupt_at`, is served whole
    and does not use the fault up. `drop_after_bytes` counts from where the answer starts; with `stall_s` the server
    first falls silent for that long. `on="REDIRECT"`: in place of the answer that leads to the CDN. `headers` without a
    `status` replace those of the right answer; `body` goes with a status. `after`: a request that writes is carried out
    first, and only its answer is lost.
    """

    times: int = 1
    on: str = "GET"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"the stand-in was told to fail"
    drop_after_bytes: int | None = None
    stall_s: float | None = None
    corrupt_at: int | None = None
    bytes_per_s: float | None = None
    after: bool = False


@dataclass
class Request:
    """One request as it was answered. `host` is "hub" or "cdn"; `file` is None for calls of the API."""

    host: str
    method: str
    path: str
    file: str | None
    range: str | None
    authorization: str | None
    status: int = 0
    bytes_sent: int = 0


@dataclass
class Repo:
    """A served directory. With `token`, nothing is given without it (`gated`: but the list of files is)."""

    directory: Path
    commit: str
    revisions: dict[str, Path]
    gated: bool = False
    token: str | None = None

    def at(self, revision: str) -> tuple[str, Path] | None:
        if revision in ("main", self.commit):
            return self.commit, self.directory
        if revision in self.revisions:
            return commit_of(self.revisions[revision]), self.revisions[revision]
        for directory in self.revisions.values():
            if commit_of(directory) == revision:
                return revision, directory
        return None


class HubStandIn:
    """The server. `cdn`: LFS files are redirected there; without `ranges` it answers 200 to every request.

    Mirrors have their storage at another port of the same host, or at the same address.
    """

    def __init__(self, *, cdn: Cdn | None = "another host", ranges: bool = True) -> None:
        self.cdn = cdn
        self.ranges = ranges
        self.requests: list[Request] = []
        self.terse = False  # say no more of a repository than a minimal server would
        self._repos: dict[str, Repo] = {}
        self._faults: list[tuple[str, Fault]] = []
        self._lock = threading.Lock()
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn_endpoint(self) -> str:
        if self.cdn == "same address":
            return self.endpoint
        host = "127.0.0.1" if self.cdn == "another port" else "localhost"
        return f"http://{host}:{self._servers[1].server_port}"

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add_repo(
        self,
        repo_id: str,
        directory: Path,
        *,
        revisions: dict[str, Path] | None = None,
        gated: bool = False,
        token: str | None = None,
    ) -> str:
        """Serve a directory as a repository; `revisions` are others by branch or tag. Returns the commit of main."""
        repo = Repo(directory, commit_of(directory), revisions or {}, gated, token)
        self._repos[repo_id] = repo
        return repo.commit

    def move_main(self, repo_id: str, directory: Path) -> str:
        """Push: from now on main is another directory. Its former commit can still be read."""
        repo = self._repos[repo_id]
        repo.revisions[repo.commit] = repo.directory
        repo.directory, repo.commit = directory, commit_of(directory)
        return repo.commit

    def fail(self, file_pattern: str, fault: Fault) -> None:
        """Let requests for the files that match fail; the pattern "api" stands for the API."""
        with self._lock:
            self._faults.append((file_pattern, fault))

    def recover(self) -> None:
        """No request fails any more."""
        with self._lock:
            self._faults.clear()

    def of(self, file: str, method: str = "GET") -> list[Request]:
        """The requests for a file that were answered with bytes or an error, redirects left out."""
        return [r for r in self.requests if r.file == file and r.method == method and r.status not in (0, 302)]

    def bytes_sent(self, file: str) -> int:
        return sum(request.bytes_sent for request in self.of(file))

    def ranges_asked(self, file: str) -> list[str | None]:
        return [request.range for request in self.of(file)]

    def files_asked(self) -> set[str]:
        """Every file that any request named."""
        return {request.file for request in self.requests if request.file is not None}

    def serve(self, handler: "Handler", path: str) -> bool:
        """Answer a request that this stand-in knows nothing of; False if nobody does."""
        return False

    def repo(self, repo_id: str) -> Repo | None:
        return self._repos.get(repo_id)

    def repo_ids(self) -> Iterable[str]:
        return self._repos

    def take_fault(self, file: str, method: str, applies: Any) -> Fault | None:
        """The first fault for this request that `applies`; it is used up once."""
        with self._lock:
            for pattern, fault in self._faults:
                if fault.times and fault.on == method and fnmatch.fnmatch(file, pattern) and applies(fault):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubStandIn, host: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.host = host

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is no news here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body after its headers would else wait 40 ms to be sent

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `hub.requests`."""

    @property
    def _hub(self) -> HubStandIn:
        return cast(_Server, self.server).hub

    def _route(self) -> None:
        host = cast(_Server, self.server).host
        path = urlsplit(self.path).path
        self.request_log = Request(
            host, self.command, unquote(path), None, self.headers.get("Range"), self.headers.get("Authorization")
        )
        self._hub.requests.append(self.request_log)
        if self._hub.serve(self, path):
            return
        if self.command not in ("GET", "HEAD"):
            self.answer(404, b"")
        elif host == "cdn" or path.startswith("/!"):
            # The Hub's CDN knows neither repositories nor tokens: the address alone opens the file.
            _, file, located = unquote(path).split("!")
            self._serve_body(file, Path(located))
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
            self._serve_info(unquote(match[1]), unquote(match[2] or "main"))
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._serve_file(unquote(match[1]), unquote(match[2]), unquote(match[3]))
        else:
            self.answer(404, b'{"error": "Sorry, we can\'t find the page you are looking for."}')

    def _serve_info(self, repo_id: str, revision: str) -> None:
        if fault := self._hub.take_fault("api", self.command, lambda fault: True):
            self.fail_before_answer(fault)
            return
        if (asked := self._asked(repo_id, revision)) is None:
            return
        repo, commit, directory = asked
        info = {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": repo.token is not None and not repo.gated,
            "gated": "auto" if repo.gated else False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in files_of(directory)],
        }
        if self._hub.terse:
            info = {key: info[key] for key in ("sha", "siblings")}
        self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json", "X-Repo-Commit": commit})

    def _asked(self, repo_id: str, revision: str, *, for_files: bool = False) -> tuple[Repo, str, Path] | None:
        """The repository, the commit and where its files lie; None after saying why there are none for this client."""
        repo = self._hub.repo(repo_id)
        if repo is None or (repo.token is not None and not repo.gated and not self._may_read(repo)):
            self.refuse(401, "RepoNotFound", "Repository not found")
            return None
        if for_files and repo.gated and not self._may_read(repo):
            self.refuse(401, "GatedRepo", "Access to this model is restricted.")
            return None
        found = repo.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, *found

    def _serve_file(self, repo_id: str, revision: str, file: str) -> None:
        self.request_log.file = file
        if (asked := self._asked(repo_id, revision, for_files=True)) is None:
            return
        _, commit, directory = asked
        path = directory / file
        if file not in files_of(directory):
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        fault = self._hub.take_fault(file, "HEAD", lambda fault: True) if self.command == "HEAD" else None
        if fault is not None and not _only_changes_headers(fault):
            self.fail_before_answer(fault)
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        changed = fault.headers if fault else {}
        if is_lfs(file):
            headers |= {"X-Linked-Etag": f'"{sha256_of(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            if self._hub.cdn:
                self._redirect(file, path, headers, changed)
                return
        self._serve_body(file, path, headers | {"ETag": f'"{etag_of(path)}"'}, changed)

    def _redirect(self, file: str, path: Path, headers: dict[str, str], changed: dict[str, str]) -> None:
        if self.command == "GET" and (fault := self._hub.take_fault(file, "REDIRECT", lambda fault: True)):
            self.fail_before_answer(fault)
            return
        located = f"{self._hub.cdn_endpoint}/!{file}!{path}"
        right = headers | {"Location": located, "ETag": f'"{sha256_of(path)[:32]}"'}
        self.answer(302, b"", right | changed)

    def _serve_body(
        self, file: str, path: Path, headers: dict[str, str] | None = None, changed: dict[str, str] | None = None
    ) -> None:
        self.request_log.file = file
        size = path.stat().st_size
        start, end = self._range(size)
        if start is None:
            self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        fault = self._hub.take_fault(file, self.command, lambda fault: _concerns(fault, start, end))
        if fault is not None and (fault.status is not None or (self.command == "HEAD" and not fault.headers)):
            self.fail_before_answer(fault)
            return
        partial = self.headers.get("Range") is not None and self._hub.ranges
        self.send_response(206 if partial else 200)
        stated = {**(headers or {}), "Content-Length": str(end - start)}
        if partial:
            stated["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send_headers(stated | (changed or {}) | (fault.headers if fault else {}))
        self.request_log.status = 206 if partial else 200
        if self.command == "GET":
            self._send(path, start, end, fault or Fault())

    def _range(self, size: int) -> tuple[int | None, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None or not self._hub.ranges:
            return 0, size
        start = int(match[1])
        return (start if start < size else None), min(size, int(match[2]) + 1 if match[2] else size)

    def _send(self, path: Path, start: int, end: int, fault: Fault) -> None:
        sent_before = 0
        with path.open("rb") as file:
            file.seek(start)
            for at in range(start, end, _PIECE_BYTES):
                piece = bytearray(file.read(min(_PIECE_BYTES, end - at)))
                if fault.corrupt_at is not None and at <= fault.corrupt_at < at + len(piece):
                    piece[fault.corrupt_at - at] ^= 0xFF
                if fault.drop_after_bytes is not None and sent_before + len(piece) > fault.drop_after_bytes:
                    self._write(piece[: fault.drop_after_bytes - sent_before])
                    self._cut_off(fault)
                    return
                self._write(piece)
                sent_before += len(piece)
                if fault.bytes_per_s:
                    time.sleep(len(piece) / fault.bytes_per_s)

    def _write(self, piece: bytearray) -> None:
        self.request_log.bytes_sent += len(piece)  # before the client can have it, and look
        try:
            self.wfile.write(piece)
        except OSError:
            self.request_log.bytes_sent -= len(piece)
            self.close_connection = True
            raise

    def _cut_off(self, fault: Fault) -> None:
        if fault.stall_s is not None:
            time.sleep(fault.stall_s)
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def fail_before_answer(self, fault: Fault) -> None:
        if fault.status is not None:
            self.answer(fault.status, fault.body, fault.headers)
            return
        if fault.stall_s is not None:
            time.sleep(fault.stall_s)
        self.hang_up()

    def hang_up(self) -> None:
        """Reset the connection in place of an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _may_read(self, repo: Repo) -> bool:
        return self.headers.get("Authorization") == f"Bearer {repo.token}"

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self.answer(status, json.dumps({"error": message}).encode(), named | (headers or {}))

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.request_log.status = status
        self.send_response(status)
        self._send_headers({"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_headers(self, stated: dict[str, str]) -> None:
        for name, value in stated.items():
            self.send_header(name, value)
        self.end_headers()


def _only_changes_headers(fault: Fault) -> bool:
    return fault.status is None and fault.stall_s is None and bool(fault.headers)


def _concerns(fault: Fault, start: int, end: int) -> bool:
    if fault.drop_after_bytes is not None:
        return end - start > fault.drop_after_bytes
    return fault.corrupt_at is None or start <= fault.corrupt_at < end


def is_lfs(file: str) -> bool:
    return any(fnmatch.fnmatch(file, pattern) for pattern in LFS_PATTERNS)


def files_of(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def commit_of(directory: Path) -> str:
    """A commit hash that changes with the files' names and sizes."""
    listing = "\n".join(f"{name} {etag_of(directory / name)}" for name in files_of(directory))
    return hashlib.sha1(listing.encode()).hexdigest()


def etag_of(path: Path) -> str:
    if is_lfs(path.name):
        return sha256_of(path)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


_sha256_by_state: dict[tuple[str, int, int], str] = {}


def sha256_of(path: Path) -> str:
    """Worked out once for each state of a file: a test may serve the same one to many requests."""
    state = (str(path), path.stat().st_size, path.stat().st_mtime_ns)
    if state not in _sha256_by_state:
        _sha256_by_state[state] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _sha256_by_state[state]
