"""The stand-in for the Hub with the part of its API that writes, for the real huggingface_hub client without xet.

    with WritableHub(tmp_path / "hub", tokens={"hf_token": {"me"}}) as hub:
        hub.fail("commit", Fault(on="POST", status=503))
        ...  # HF_ENDPOINT=hub.endpoint, HF_TOKEN=hf_token, HF_HUB_DISABLE_XET=1
        assert hub.files_of("me/model") == {...}

Each request that writes is a step: create, branch, preupload, batch, put, part, complete, verify, yaml, commit. Faults
name steps, with on="POST" or "PUT". `hub.watch(step, when)` is called before ("before") and after ("after") each is
carried out; where it returns True, the connection ends there. Bytes are put to the second server, by signed addresses,
as the Hub has them put to its storage.
"""

import base64
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_stand_in import Fault, Handler, HubStandIn, Repo, etag_of, files_of, is_lfs, sha256_of

SIGNATURE = "X-Amz-Signature=signed-by-the-storage"
_PAGE = 40  # files in one answer about a tree


@dataclass(frozen=True)
class Commit:
    """A commit as it was asked for."""

    repo_id: str
    revision: str
    message: str
    files: tuple[str, ...]


@dataclass
class _Stored:
    """What a repository has in its storage, by sha256, and how many bytes it takes."""

    objects: dict[str, Path] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    quota_bytes: int | None = None


class WritableHub(HubStandIn):
    """`tokens` are those that are valid, each with the namespaces that it may write to. `part_bytes` splits uploads."""

    def __init__(self, root: Path, tokens: dict[str, set[str]], *, part_bytes: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.part_bytes = part_bytes
        self.commits: list[Commit] = []
        self.put_objects: Counter[str] = Counter()  # complete uploads by sha256
        self.put_bytes = 0
        self.watch: Callable[[str, str], bool] = lambda step, when: False
        self._root = root
        self._stored: dict[str, _Stored] = {}
        self._states = 0

    def new_repo(self, repo_id: str, files: dict[str, bytes] | None = None, *, private_to: str | None = None) -> None:
        """A repository with the file that the Hub creates, and others."""
        directory = self._new_directory()
        for name, data in {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        self.add_repo(repo_id, directory, token=private_to)
        self._stored[repo_id] = _Stored()

    def limit(self, repo_id: str, quota_bytes: int) -> None:
        self._stored[repo_id].quota_bytes = quota_bytes

    def collect_garbage(self, repo_id: str) -> None:
        """Lose the bytes of all files that no commit names."""
        repo = self.repo(repo_id)
        assert repo is not None
        used = {sha256_of(repo.directory / name) for name in files_of(repo.directory)}
        objects = self._stored[repo_id].objects
        self._stored[repo_id].objects = {oid: path for oid, path in objects.items() if oid in used}

    def directory_of(self, repo_id: str, revision: str = "main") -> Path:
        repo = self.repo(repo_id)
        assert repo is not None
        found = repo.at(revision)
        assert found is not None
        return found[1]

    def files_of(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a repository but the one that the Hub created."""
        directory = self.directory_of(repo_id, revision)
        return {name: (directory / name).read_bytes() for name in files_of(directory) if name != ".gitattributes"}

    def serve(self, handler: Handler, path: str) -> bool:
        """Answer a request of the API that writes, or one about a tree."""
        authorization = handler.headers.get("Authorization", "")
        if path.startswith("/api/") and authorization and authorization.removeprefix("Bearer ") not in self.tokens:
            _read(handler)
            handler.refuse(401, "", "Invalid credentials in Authorization header")
            return True
        for method, pattern, step in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and handler.command == method:
                self._carry_out(handler, step, [unquote(group) for group in match.groups()])
                return True
        return False

    def _carry_out(self, handler: Handler, step: str, arguments: list[str]) -> None:
        fault = self.take_fault(step, handler.command, lambda fault: True)
        if fault is not None and fault.drop_after_bytes is not None:
            handler.rfile.read(fault.drop_after_bytes)
            handler.hang_up()
            return
        body = _read(handler)
        if self.watch(step, "before"):
            handler.hang_up()
            return
        if fault is not None and not fault.after:
            handler.fail_before_answer(fault)
            return
        status, document, headers = getattr(self, f"_{step}")(handler, body, *arguments)
        if self.watch(step, "after") or (fault is not None and fault.status is None):
            handler.hang_up()
        elif status >= 400:
            handler.refuse(status, headers.get("code", ""), document)
        else:
            handler.answer(status, json.dumps(document).encode(), {"Content-Type": "application/json", **headers})

    # Steps. Each returns a status, a document (a message, for an error) and headers.

    def _create(self, handler: Handler, body: bytes) -> "Answer":
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if refusal := self._refusal(handler, repo_id):
            return refusal
        if self.repo(repo_id) is not None:
            return 409, "You already created this model repo", {}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.new_repo(repo_id, private_to=_token_of(handler) if private else None)
        return 200, {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}, {}

    def _branch(self, handler: Handler, body: bytes, repo_id: str, branch: str) -> "Answer":
        if refusal := self._refusal(handler, repo_id):
            return refusal
        repo = self._known(repo_id)
        if branch in repo.revisions:
            return 409, "The branch exists", {}
        repo.revisions[branch] = repo.directory
        return 200, {}, {}

    def _preupload(self, handler: Handler, body: bytes, repo_id: str, revision: str) -> "Answer":
        if refusal := self._refusal(handler, repo_id):
            return refusal
        directory = self.directory_of(repo_id, revision)
        files = []
        for asked in json.loads(body)["files"]:
            path = directory / asked["path"]
            answer = {"path": asked["path"], "uploadMode": "lfs" if is_lfs(asked["path"]) else "regular"}
            files.append(answer | {"shouldIgnore": False} | ({"oid": etag_of(path)} if path.is_file() else {}))
        return 200, {"files": files}, {}

    def _batch(self, handler: Handler, body: bytes, repo_id: str) -> "Answer":
        if refusal := self._refusal(handler, repo_id):
            return refusal
        stored = self._stored[repo_id]
        objects = [self._batch_object(repo_id, stored, each) for each in json.loads(body)["objects"]]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _batch_object(self, repo_id: str, stored: _Stored, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid in stored.objects:
            return answer
        taken = sum(path.stat().st_size for path in stored.objects.values())
        if stored.quota_bytes is not None and taken + size > stored.quota_bytes:
            return answer | {"error": {"code": 413, "message": f"{repo_id} has no storage left"}}
        to = f"{self.cdn_endpoint}/storage/{repo_id}/{oid}"
        upload: dict[str, Any] = {"href": f"{to}?{SIGNATURE}"}
        if self.part_bytes is not None and size > self.part_bytes:
            parts = math.ceil(size / self.part_bytes)
            header = {str(number): f"{to}/{number}?{SIGNATURE}" for number in range(1, parts + 1)}
            upload = {
                "href": f"{self.endpoint}/api/complete_multipart/{repo_id}/{oid}?{SIGNATURE}",
                "header": {"chunk_size": str(self.part_bytes), **header},
            }
        verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
        return answer | {"actions": {"upload": upload, "verify": verify}}

    def _put(self, handler: Handler, body: bytes, repo_id: str, oid: str) -> "Answer":
        return self._store(repo_id, oid, body)

    def _part(self, handler: Handler, body: bytes, repo_id: str, oid: str, number: str) -> "Answer":
        self._stored[repo_id].parts.setdefault(oid, {})[int(number)] = body
        return 200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def _complete(self, handler: Handler, body: bytes, repo_id: str, oid: str) -> "Answer":
        parts = self._stored[repo_id].parts.pop(oid)
        asked = json.loads(body)["parts"]
        expected = [(number, f'"{hashlib.md5(data).hexdigest()}"') for number, data in sorted(parts.items())]
        if [(each["partNumber"], each["etag"]) for each in asked] != expected:
            return 400, "other parts were uploaded", {}
        return self._store(repo_id, oid, b"".join(parts[number] for number in sorted(parts)))

    def _store(self, repo_id: str, oid: str, data: bytes) -> "Answer":
        if hashlib.sha256(data).hexdigest() != oid:
            return 400, "the bytes have another sha256", {}
        path = self._root / "objects" / repo_id.replace("/", "--") / oid
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._stored[repo_id].objects[oid] = path
        self.put_objects[oid] += 1
        self.put_bytes += len(data)
        return 200, {}, {}

    def _verify(self, handler: Handler, body: bytes, repo_id: str) -> "Answer":
        asked = json.loads(body)
        path = self._stored[repo_id].objects.get(asked["oid"])
        if path is None or path.stat().st_size != asked["size"]:
            return 404, "no such object", {}
        return 200, {}, {}

    def _yaml(self, handler: Handler, body: bytes) -> "Answer":
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if front is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _commit(self, handler: Handler, body: bytes, repo_id: str, revision: str) -> "Answer":
        if refusal := self._refusal(handler, repo_id):
            return refusal
        header, *operations = [json.loads(line) for line in body.splitlines()]
        objects = self._stored[repo_id].objects
        lacking = [each["value"]["oid"] for each in operations if each["key"] == "lfsFile"]
        if any(oid not in objects for oid in lacking):
            return 400, "LFS pointer pointed to a file that does not exist", {}
        directory = self._new_directory()
        shutil.copytree(self.directory_of(repo_id, revision), directory, dirs_exist_ok=True, copy_function=os.link)
        for operation in operations:
            value = operation["value"]
            path = directory / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if operation["key"] == "lfsFile":
                os.link(objects[value["oid"]], path)
            else:
                path.write_bytes(base64.b64decode(value["content"]))
        names = tuple(each["value"]["path"] for each in operations)
        self.commits.append(Commit(repo_id, revision, header["value"]["summary"], names))
        repo = self._known(repo_id)
        if revision == "main":
            self.move_main(repo_id, directory)
        else:
            repo.revisions[revision] = directory
        oid = repo.at(revision)[0]  # type: ignore[index]
        return 200, {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid}, {}

    def _tree(self, handler: Handler, body: bytes, repo_id: str, revision: str) -> "Answer":
        repo = self.repo(repo_id)
        found = repo.at(revision) if repo is not None else None
        if found is None:
            return 404, f"Invalid rev id: {revision}", {"code": "RevisionNotFound"}
        start = int(parse_qs(urlsplit(handler.path).query).get("cursor", ["0"])[0])
        names = files_of(found[1])
        entries = [_entry(found[1], name) for name in names[start : start + _PAGE]]
        url = f"{self.endpoint}{urlsplit(handler.path).path}?recursive=true&cursor={start + _PAGE}"
        return 200, entries, {"Link": f'<{url}>; rel="next"'} if start + _PAGE < len(names) else {}

    def _refusal(self, handler: Handler, repo_id: str) -> "Answer | None":
        namespaces = self.tokens.get(_token_of(handler))
        if namespaces is None:
            return 401, "Invalid credentials in Authorization header", {}
        if repo_id.split("/")[0] not in namespaces:
            return 403, "You don't have the rights to write to this namespace", {}
        return None

    def _known(self, repo_id: str) -> Repo:
        repo = self.repo(repo_id)
        assert repo is not None
        return repo

    def _new_directory(self) -> Path:
        self._states += 1
        directory = self._root / f"state-{self._states}"
        directory.mkdir(parents=True)
        return directory


Answer = tuple[int, Any, dict[str, str]]

_NAME = r"([^/]+/[^/]+?)"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", f"/api/models/{_NAME}/branch/(.+)", "branch"),
    ("POST", f"/api/models/{_NAME}/preupload/(.+)", "preupload"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", f"/storage/{_NAME}/([0-9a-f]+)", "put"),
    ("PUT", f"/storage/{_NAME}/([0-9a-f]+)/([0-9]+)", "part"),
    ("POST", f"/api/complete_multipart/{_NAME}/([0-9a-f]+)", "complete"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", "verify"),
    ("POST", "/api/validate-yaml", "yaml"),
    ("POST", f"/api/models/{_NAME}/commit/(.+)", "commit"),
    ("GET", f"/api/models/{_NAME}/tree/(.+)", "tree"),
]


def _entry(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    size = path.stat().st_size
    if not is_lfs(name):
        return {"type": "file", "path": name, "size": size, "oid": etag_of(path)}
    sha256 = sha256_of(path)
    lfs = {"oid": sha256, "size": size, "pointerSize": 134}
    return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(sha256.encode()).hexdigest(), "lfs": lfs}


def _token_of(handler: Handler) -> str:
    return handler.headers.get("Authorization", "").removeprefix("Bearer ")


def _read(handler: Handler) -> bytes:
    """The body of a request, which huggingface_hub sends with its length or in chunks."""
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", "0")))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


__all__ = ["SIGNATURE", "Commit", "Fault", "WritableHub"]
