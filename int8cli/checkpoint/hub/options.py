"""How to reach the Hub, and where to put downloads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from int8cli.checkpoint.hub.retries import RetryPolicy
from int8cli.checkpoint.own_files import OwnPath
from int8cli.errors import AccessDeniedError


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to reach the Hub and where to put what it gives. None means huggingface_hub's own default.

    `download_dir` is this source's alone: files lie there while they are used, and parts until they are whole. Links
    are followed up to `download_below`, the directory above it unless given, and none after it. With
    `keep_source` files go to the Hub cache instead and stay. `on_bytes(file_name, n)` hears of each piece that is
    transferred, `on_wait(what, why, pause_s)` of each pause before a retry; both may be called from another thread.
    `probably_a_path`: the name may be that of a directory, mistyped; a Hub that does not answer is asked only once.
    """

    download_dir: Path
    keep_source: bool = False
    endpoint: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    timeout_s: float | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    on_bytes: Callable[[str, int], None] | None = None
    on_wait: Callable[[str, str, float], None] | None = None
    download_below: Path | None = None
    probably_a_path: bool = False

    @property
    def downloads(self) -> OwnPath:
        """Where files lie while they are used."""
        return OwnPath(self.download_dir, self.download_below or self.download_dir.parent)

    @property
    def hub_cache(self) -> Path:
        """The directory of huggingface_hub's cache."""
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    @property
    def request_timeout_s(self) -> float:
        from huggingface_hub import constants

        return self.timeout_s or constants.HF_HUB_DOWNLOAD_TIMEOUT

    def request_headers(self) -> dict[str, str]:
        """The headers of every request, with the token. Raises AccessDeniedError for a token that is not ASCII."""
        return request_headers(self.token)


def request_headers(token: str | None) -> dict[str, str]:
    """The headers of a request to the Hub, with this token or else that of the user.

    Raises AccessDeniedError for a token that is not ASCII.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, not marked so

    headers: dict[str, str] = build_hf_headers(token=token, library_name="int8cli")
    if not headers.get("authorization", "").isascii():
        raise AccessDeniedError(
            "the token for the Hub has invalid characters", hint="Check HF_TOKEN, or run `hf auth login`."
        )
    return headers
