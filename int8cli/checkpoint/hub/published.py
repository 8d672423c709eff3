"""The Hub's metadata of a file: commit, size and digest.

Owns which answer in a chain of redirects is used: the Hub's own, never that of the storage that serves the bytes.
huggingface_hub distinguishes the two by host or origin. Its rule differs between releases, and mistakes storage under
the Hub's own name for the Hub; the digest is then silently missing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from int8cli.checkpoint.digest import git_sha1_of, sha256_of
from int8cli.checkpoint.hub.failures import MalformedAnswerError
from int8cli.checkpoint.hub.requests import RemoteFile, malformed_answers, raise_for_status

SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_A_SIZE = re.compile(r"[0-9]{1,18}")
_REDIRECTS = 10
# https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/constants.py
_COMMIT = "X-Repo-Commit"
_LINKED_ETAG = "X-Linked-Etag"
_LINKED_SIZE = "X-Linked-Size"


@dataclass(frozen=True, slots=True)
class Published:
    """The Hub's size and etag of a file.

    The etag is the sha256 of a file in LFS, and the sha1 of the git blob for other files. Etags of other servers say
    nothing about the bytes.
    """

    size_bytes: int
    etag: str

    @property
    def sha256(self) -> str | None:
        return self.etag if SHA256.fullmatch(self.etag) else None

    @property
    def git_sha1(self) -> str | None:
        return self.etag if _SHA1.fullmatch(self.etag) else None

    def has_digest_of(self, path: Path) -> bool:
        """Whether a file has the published digest; True if none was published. Reads all of it.

        Raises SourceError.
        """
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        return self.git_sha1 is None or git_sha1_of(path) == self.git_sha1


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """A server's metadata of a file. What it does not send is None, or an empty etag."""

    commit: str | None
    size_bytes: int | None
    etag: str


def ask(remote: RemoteFile) -> FileAnswer:
    """Send a HEAD, and follow redirects up to the answer that describes the file.

    A redirect with the digest of its target (`X-Linked-Etag`) is that answer. Redirects within a server are followed,
    for example to a repository's new name. One to another server is followed only if it has no commit, and without the
    token. Raises huggingface_hub's errors, or MalformedAnswerError for endless redirects.
    """
    url, headers = remote.url, {**remote.headers, "Accept-Encoding": "identity"}  # the size without compression
    with malformed_answers():
        for _ in range(_REDIRECTS):
            response = _head(url, headers, remote.timeout_s)
            if not response.has_redirect_location or _LINKED_ETAG in response.headers:
                return _answer_of(response)
            target = urljoin(url, response.headers["Location"])
            if _origin(target) != _origin(url):
                if _COMMIT in response.headers:
                    return _answer_of(response)
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            url = target
    raise MalformedAnswerError("the server redirects without end")


def _head(url: str, headers: Mapping[str, str], timeout_s: float) -> Any:
    from huggingface_hub import get_session

    response = get_session().request("HEAD", url, headers=headers, timeout=timeout_s, follow_redirects=False)
    raise_for_status(response)
    return response


def _answer_of(response: Any) -> FileAnswer:
    headers = response.headers
    etag: str = headers.get(_LINKED_ETAG) or headers.get("ETag") or ""
    size = headers.get(_LINKED_SIZE) or (None if response.is_redirect else headers.get("Content-Length"))
    return FileAnswer(
        commit=headers.get(_COMMIT),
        size_bytes=int(size) if size is not None and _A_SIZE.fullmatch(size) else None,
        etag=etag.removeprefix("W/").strip('"'),
    )


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
