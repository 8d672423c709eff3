"""One GET of a file on the Hub, or of a range of it.

Owns the request and how the answer is read. huggingface_hub provides the session, headers and error classes.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from int8cli.checkpoint.hub.failures import MalformedAnswerError, WrongRangeError
from int8cli.errors import TransferError

_LONGEST_ERROR_BYTES = 1 << 16
_A_SIZE = re.compile("[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL, and how to request it. `headers` contain the token; redirects to another host drop it."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    timeout_s: float


@contextmanager
def get(remote: RemoteFile, byte_range: str | None) -> Iterator[Any]:
    """The streamed answer (an httpx Response) to a GET. Raises huggingface_hub's errors, but lets 416 through."""
    from huggingface_hub import get_session

    # Compressed bytes would have other offsets than the file's.
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if byte_range is not None:
        headers["Range"] = byte_range
    # Every request starts at this URL, not at its redirect's target: signed addresses expire within the hour. The
    # session follows redirects and drops the token if the host changes.
    with ExitStack() as stack:
        with malformed_answers():
            response = stack.enter_context(
                get_session().stream(
                    "GET", remote.url, headers=headers, timeout=remote.timeout_s, follow_redirects=True
                )
            )
        if response.status_code != 416 or byte_range is None:
            raise_for_status(_with_short_body(response) if response.status_code >= 400 else response)
        yield response


def get_whole(url: str, headers: Mapping[str, str], timeout_s: float, limit_bytes: int, what: str) -> bytes:
    """The body of the answer to a GET. Raises huggingface_hub's errors, and TransferError for more bytes than that."""
    from huggingface_hub import get_session

    with ExitStack() as stack:
        with malformed_answers():
            response = stack.enter_context(
                get_session().stream("GET", url, headers=headers, timeout=timeout_s, follow_redirects=True)
            )
        if response.status_code >= 400:
            raise_for_status(_with_short_body(response))
        with malformed_answers():
            body = _first_bytes(response, limit_bytes + 1)
    if len(body) > limit_bytes:
        raise TransferError(
            f"{what}: the server's answer has more than {limit_bytes:,} bytes", hint="Check HF_ENDPOINT."
        )
    return body


def _with_short_body(response: Any) -> Any:
    """An error's answer with the start of its body alone: huggingface_hub would read it whole, however long it is."""
    with malformed_answers():
        body = _first_bytes(response, _LONGEST_ERROR_BYTES)
    of_the_body = {b"content-encoding", b"content-length", b"transfer-encoding"}
    headers = [(name, value) for name, value in response.headers.raw if name.lower() not in of_the_body]
    return type(response)(response.status_code, headers=headers, content=body, request=response.request)


def _first_bytes(response: Any, most: int) -> bytes:
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) >= most:
            break
    return bytes(body[:most])


@contextmanager
def malformed_answers() -> Iterator[None]:
    """Raise MalformedAnswerError for the errors of httpx and huggingface_hub about an answer that they cannot parse."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise MalformedAnswerError(
            f"the server's answer is malformed ({type(error).__name__}: {error!s:.100})"
        ) from error


def raise_for_status(response: Any) -> None:
    """Raise huggingface_hub's error for a status that is not a success, whatever the body is."""
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hf_raise_for_status(response)
    except HfHubHTTPError:
        raise
    except Exception as error:  # it decodes the body, which may be anything
        raise HfHubHTTPError(f"HTTP {response.status_code}", response=response) from error


def answers_range(response: Any, first: int) -> bool:
    """Whether the answer starts at byte `first` (206) or is the whole file (200)."""
    if response.status_code == 200:
        return False
    stated = response.headers.get("Content-Range", f"bytes {first}-")
    match = re.match(r"bytes ([0-9]{1,19})-", stated)
    if response.status_code != 206 or match is None or int(match[1]) != first:
        raise WrongRangeError(f"HTTP {response.status_code} without the requested bytes from {first:,} on")
    return True


def total_bytes(response: Any) -> int | None:
    """The size of the whole file, if the answer contains it."""
    stated = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not stated and response.status_code == 200 and "Content-Encoding" not in response.headers:
        stated = response.headers.get("Content-Length", "")
    return int(stated) if _A_SIZE.fullmatch(stated) else None
