"""Failures of uploads to the Hub: what caused them, and which errors to raise for those that a retry does not help.

Owns the translation of the errors of huggingface_hub's upload functions. Makes no requests.
"""

import re
from typing import TYPE_CHECKING

from int8cli.checkpoint.hub.failures import TRY_AGAIN, OutdatedRequestError, described, is_foreign, translated
from int8cli.errors import AccessDeniedError, DestinationError, Int8cliError, TransferError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_LONGEST = 300
_NO_ROOM = (402, 413, 507)  # payment required, too large, insufficient storage
# What the Hub says with a 403 where an account has no storage left, and not where a token may not write.
_FULL = re.compile(r"\b(?:storage|quota)\b.*\b(?:limit|exceeded|full|reached)\b", re.IGNORECASE)
# What a storage says of a signed address that came too late, and of a body that came too slowly.
_EXPIRED = re.compile(r"expired|not valid in the specified time", re.IGNORECASE)
_SLOW = re.compile("RequestTimeout", re.IGNORECASE)
_MAY_WRITE = "Check the name, and the token: set HF_TOKEN or run `hf auth login` with one that may write there."
_STAYS_REFUSED = (
    "Nobody else has written there meanwhile. Look at the repository's page and its settings, and try again."
)
_STAYS_EXPIRED = "Check the clocks of this machine and of the server, and try again."


def cause_of(error: Exception) -> Exception:
    """The error that made an upload fail: huggingface_hub wraps that of a file in a RuntimeError."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_refusal(error: Exception) -> bool:
    """Whether huggingface_hub or hf_xet refused to go on by an error that is not one of a request.

    huggingface_hub raises ValueError for the errors of single files that the Hub answers, and hf_xet has errors of its
    own.
    """
    return isinstance(error, (ValueError, RuntimeError)) or type(error).__module__.partition(".")[0] == "hf_xet"


def outdated(error: Exception) -> OutdatedRequestError | None:
    """What to raise for a refusal that a new request may not meet; None for others.

    Somebody else has made a commit at the same moment (409, 412), or the signed address of an upload has expired. A new
    request is about the repository as it is then, with a new address.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    overtaken = status in (409, 412) and "/commit/" in error.response.url.path
    if overtaken:
        return OutdatedRequestError(_said_by(error))
    if status not in (400, 401, 403) or not _is_signed(error):
        return None
    if _SLOW.search(error.response.text):
        return OutdatedRequestError(_said_by(error), state=None)
    return OutdatedRequestError(_said_by(error)) if _EXPIRED.search(error.response.text) else None


def _is_signed(error: "HfHubHTTPError") -> bool:
    """Whether the refused request had no token: the address alone opens a storage."""
    return "Authorization" not in error.response.request.headers


def upload_error(error: Exception, what: str) -> Int8cliError:
    """The error of our tree for an error of an upload that is not transient."""
    from huggingface_hub import errors as hub

    if isinstance(error, (hub.OfflineModeIsEnabled, hub.RevisionNotFoundError, hub.DisabledRepoError)):
        return translated(error, what)
    if isinstance(error, hub.HfHubHTTPError):
        status, said = error.response.status_code, _said_by(error)
        if status in _NO_ROOM or (status == 403 and _FULL.search(said)):
            return no_room(what, said)
        if status in (401, 403, 404):
            return AccessDeniedError(f"{what}: {said}", hint=_MAY_WRITE)
        return DestinationError(f"{what}: {said}", hint=TRY_AGAIN)
    if isinstance(error, OutdatedRequestError):
        hint = _STAYS_REFUSED if error.state else _STAYS_EXPIRED
        return DestinationError(f"{what}: {error} (new requests are refused too)", hint=hint)
    if is_foreign(error):
        return translated(error, what)
    return TransferError(f"{what}: the upload failed ({shortened(str(error))})", hint=TRY_AGAIN)


def no_room(what: str, said: str) -> DestinationError:
    """The error for a repository that takes no more bytes."""
    return DestinationError(
        f"{what}: {said}", hint="Make room there, or choose another repository. The same command then resumes."
    )


def shortened(text: str) -> str:
    """What a server or library said, in one short line, without tokens and the signatures of addresses."""
    text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
    text = re.sub(r"\b(?:hf_|Bearer )[\w.~+/-]+=*", "…", text)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _said_by(error: Exception) -> str:
    """The status of an answer, and the server's own words if it has any."""
    words = shortened(getattr(error, "server_message", None) or "")
    return f"{described(error)}: {words}" if words else described(error)
