"""Failures of requests to the Hub: which are transient, and which errors to raise for the others.

Owns the translation of huggingface_hub's and httpx's errors into our tree. Makes no requests.
"""

import re
import sys
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import ModuleType

from int8cli.checkpoint.disk import disk_error
from int8cli.errors import (
    AccessDeniedError,
    Int8cliError,
    ModelNotFoundError,
    SourceError,
    TransferError,
)

TRY_AGAIN = "Run the same command again: it resumes where this run stopped."
_LONGEST_WAIT_S = 600.0


class ShortBodyError(Exception):
    """A body is shorter than announced, although the connection ended normally."""


class WrongRangeError(Exception):
    """A server answered with another range than the requested one."""


class MalformedAnswerError(Exception):
    """A server's answer is invalid: a size that is not a number, a redirect to nowhere."""


class OutdatedRequestError(Exception):
    """A request was refused because it was made too long ago: made anew, it may be taken.

    `state` says what it was about, as the server has it now: a request about another state is another one. None for a
    request that came too slowly: the next one may be faster.
    """

    def __init__(self, message: str, state: str | None = "") -> None:
        super().__init__(message)
        self.state = state


def is_foreign(error: Exception) -> bool:
    """Whether the network, the server or huggingface_hub caused the error. Any other error is a bug."""
    httpx = _httpx()
    return isinstance(
        error,
        (
            ShortBodyError,
            WrongRangeError,
            MalformedAnswerError,
            OutdatedRequestError,
            httpx.HTTPError,
            httpx.InvalidURL,
            OSError,
        ),
    )


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: dropped connections, timeouts, 408, 429 and 5xx."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status: int = error.response.status_code
        return status in (408, 429) or status >= 500
    httpx = _httpx()
    transient = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
    ours = (ShortBodyError, WrongRangeError, MalformedAnswerError, OutdatedRequestError)
    return isinstance(error, (*ours, *transient))


def asked_pause_s(error: Exception) -> float | None:
    """The pause that the server requests: Retry-After in seconds or as a date, or the Hub's `RateLimit: …;t=55`."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    asked = headers.get("Retry-After", "").strip()
    limited = re.search(r";\s*t=(\d+)", headers.get("RateLimit", "")) if error.response.status_code == 429 else None
    if re.fullmatch("[0-9]+", asked):
        pause_s: float | None = float(asked)
    elif asked:
        pause_s = _seconds_until(asked)
    else:
        pause_s = float(limited[1]) if limited else None
    return None if pause_s is None else min(max(pause_s, 0.0), _LONGEST_WAIT_S)


def _seconds_until(http_date: str) -> float | None:
    """None if the text is not a date."""
    try:
        moment = parsedate_to_datetime(http_date)
    except (ValueError, TypeError, IndexError, OverflowError):  # depends on the fault and on Python's release
        return None
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - datetime.now(UTC)).total_seconds()


def described(error: Exception) -> str:
    """A failure in a few words, without the URL, which may contain a signature."""
    from huggingface_hub.errors import HfHubHTTPError

    httpx = _httpx()
    if isinstance(error, HfHubHTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason_phrase}".strip()
    if isinstance(error, httpx.ConnectTimeout):
        return "connecting to the server timed out"
    if isinstance(error, httpx.TimeoutException):
        return "the server stopped sending data"
    if isinstance(error, httpx.ConnectError):
        return f"the server could not be reached ({error})"
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return "the connection was dropped"
    return str(error) or type(error).__name__


def translated(error: Exception, what: str) -> Int8cliError:
    """The error of our tree for an error of huggingface_hub or httpx that is not transient."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled):
        return TransferError(
            f"{what}: cannot reach the Hub in offline mode", hint="Unset HF_HUB_OFFLINE, or download the model first."
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return ModelNotFoundError(f"{what}: no such revision", hint="Give a branch, a tag or a full commit hash.")
    if isinstance(error, hub.EntryNotFoundError):
        return ModelNotFoundError(f"{what}: no such file in the repository", hint="The repository may be incomplete.")
    if isinstance(error, hub.GatedRepoError):
        return AccessDeniedError(
            f"{what}: the repository is gated",
            hint="Accept its terms on the model's page, then set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, hub.DisabledRepoError):
        return AccessDeniedError(f"{what}: the Hub has disabled this repository")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{what}: no such repository on the Hub, or it is private",
            hint="Check the name; for a private one, set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, hub.HfHubHTTPError):
        return _refused(error.response.status_code, described(error), what)
    if isinstance(error, OSError) and error.filename is not None:
        return disk_error(Path(error.filename), error)
    return TransferError(f"{what}: {described(error)}", hint="Check HF_ENDPOINT and the network.")


def next_step(error: Exception) -> str:
    httpx = _httpx()
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return f"Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses only the Hub cache. {TRY_AGAIN}"
    return TRY_AGAIN


def _refused(status: int, description: str, what: str) -> SourceError:
    if status in (401, 403):
        return AccessDeniedError(
            f"{what}: {description}",
            hint="Check the name and the token: set HF_TOKEN or run `hf auth login` with an account that has access.",
        )
    if status in (404, 410):
        return ModelNotFoundError(f"{what}: {description}", hint="Check the name and the revision.")
    return TransferError(f"{what}: {description}", hint="Check HF_ENDPOINT and the network.")


def _httpx() -> ModuleType:
    """The HTTP library of the installed huggingface_hub: httpx, or its successor httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return sys.modules[base.__module__.partition(".")[0]]
