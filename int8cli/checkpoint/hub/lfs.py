"""The Git LFS batch API: which files' bytes a repository already has, by their sha256.

Owns that request. https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8cli.checkpoint.hub.failures import MalformedAnswerError
from int8cli.checkpoint.hub.requests import raise_for_status
from int8cli.checkpoint.hub.upload_failures import no_room, shortened
from int8cli.typed_json import InvalidJsonError, parse_json

_MOST_OBJECTS = 256  # in one request, as huggingface_hub has it
_MEDIA_TYPE = "application/vnd.git-lfs+json"


@dataclass(frozen=True, slots=True)
class LfsObject:
    """The bytes of a file, by their sha256 in hex."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LfsServer:
    """Where to ask: the address of a repository, the branch that will be written, and the headers with the token."""

    repository_url: str
    revision: str
    headers: Mapping[str, str]
    timeout_s: float

    def missing(self, objects: Sequence[LfsObject], what: str) -> set[str]:
        """The sha256 of the objects that the repository does not have.

        Raises DestinationError, naming `what`, if it would not take one of them, huggingface_hub's errors, and
        MalformedAnswerError.
        """
        missing: set[str] = set()
        for start in range(0, len(objects), _MOST_OBJECTS):
            missing |= self._missing(objects[start : start + _MOST_OBJECTS], what)
        return missing

    def _missing(self, objects: Sequence[LfsObject], what: str) -> set[str]:
        from huggingface_hub import get_session

        request = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "hash_algo": "sha256",
            "ref": {"name": self.revision},
            "objects": [{"oid": each.sha256, "size": each.size_bytes} for each in objects],
        }
        response = get_session().post(
            f"{self.repository_url}.git/info/lfs/objects/batch",
            headers={**self.headers, "Accept": _MEDIA_TYPE, "Content-Type": _MEDIA_TYPE},
            json=request,
            timeout=self.timeout_s,
        )
        raise_for_status(response)
        answered = dict(_answers(response.content, what))
        if answered.keys() != {each.sha256 for each in objects}:
            raise MalformedAnswerError("the server's answer is not about the files that it was asked for")
        return {sha256 for sha256, is_missing in answered.items() if is_missing}


def _answers(body: bytes, what: str) -> Iterator[tuple[str, bool]]:
    """Each object of an answer with whether its bytes must be sent."""
    try:
        document = parse_json(body)
    except InvalidJsonError as error:
        raise MalformedAnswerError("the server's answer is not JSON") from error
    objects: Any = document.get("objects") if isinstance(document, dict) else None
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise MalformedAnswerError("the server's answer names no objects")
    for each in objects:
        if refusal := each.get("error"):
            words = refusal.get("message") if isinstance(refusal, dict) else None
            raise no_room(what, f"the server does not take it: {shortened(str(words or refusal))}")
        yield str(each.get("oid")), bool(each.get("actions"))
