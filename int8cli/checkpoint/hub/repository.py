"""A repository: the commit that is read, and its list of files.

Owns the first request to the Hub, and the snapshot in the Hub cache that replaces it offline.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from urllib.parse import quote

from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.requests import get_whole
from int8cli.checkpoint.hub.retries import Retries, RetryPolicy
from int8cli.checkpoint.source import is_hidden
from int8cli.errors import ModelNotFoundError, SourceError, TransferError
from int8cli.typed_json import InvalidJsonError, parse_json, read_as, shown

PLAIN_NAME = re.compile(r"\w[\w.-]*")
_ANSWER_LIMIT_BYTES = 256 << 20  # 100 bytes a file
_FIRST_CONTACT_ATTEMPTS = 5  # a wrong endpoint or a missing network should be reported in seconds, not minutes
_PROBABLY_A_PATH_ATTEMPTS = 2  # and a mistyped directory in a second


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit. `offline`: only the files in the Hub cache are available."""

    commit: str
    files: tuple[str, ...]
    offline: bool


class Repository:
    """A repository at one commit: the one that the revision named at the first request, even if it moves later."""

    def __init__(self, repo_id: str, revision: str | None, options: HubOptions, stop: Event) -> None:
        """Makes no request. `stop` ends a wait for the Hub."""
        self.repo_id = repo_id
        self.revision = revision
        self._options = options
        self._stop = stop

    @cached_property
    def snapshot(self) -> Snapshot:
        """The commit and its files, requested at first use.

        Raises ModelNotFoundError, AccessDeniedError or TransferError.
        """
        from huggingface_hub import constants

        quiet_huggingface_hub()
        return self._snapshot_in_cache() if constants.HF_HUB_OFFLINE else self._snapshot_on_hub()

    @property
    def commit(self) -> str:
        return self.snapshot.commit

    def label(self, file_name: str) -> str:
        """The name of a file in messages."""
        return f"{self.repo_id}: {file_name}"

    def require_online(self, file_name: str) -> None:
        """Raise ModelNotFoundError in offline mode, for a file that is not in the Hub cache."""
        if self.snapshot.offline:
            raise ModelNotFoundError(
                f"{self.label(file_name)} is not in the Hub cache, and cannot be downloaded in offline mode",
                hint="Unset HF_HUB_OFFLINE, or download the model first.",
            )

    def _snapshot_on_hub(self) -> Snapshot:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not marked so

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ModelNotFoundError(f"{self.repo_id!r} is not a valid name of a Hub repository") from error
        policy = self._options.retry
        most = _PROBABLY_A_PATH_ATTEMPTS if self._options.probably_a_path else _FIRST_CONTACT_ATTEMPTS
        attempts = min(policy.attempts, most)
        first_contact = RetryPolicy(attempts, policy.first_pause_s, policy.max_pause_s)
        what = self.repo_id if self.revision is None else f"{self.repo_id} at revision {self.revision!r}"
        headers = self._options.request_headers()
        answer = Retries(first_contact, what, self._stop, self._options.on_wait).call(lambda: self._ask(headers))
        try:
            return _snapshot_of(answer)
        except InvalidJsonError as error:  # for example a web page instead of JSON
            raise self._no_hub() from error

    def _ask(self, headers: Mapping[str, str]) -> bytes:
        """The Hub's description of the repository, in JSON: https://huggingface.co/docs/hub/api."""
        from huggingface_hub import constants

        url = f"{self._options.endpoint or constants.ENDPOINT}/api/models/{self.repo_id}"
        if self.revision is not None:
            url += f"/revision/{quote(self.revision, safe='')}"
        return get_whole(url, headers, self._options.request_timeout_s, _ANSWER_LIMIT_BYTES, self.repo_id)

    def _no_hub(self) -> SourceError:
        return TransferError(f"{self.repo_id}: the server does not answer like a Hub", hint="Check HF_ENDPOINT.")

    def _snapshot_in_cache(self) -> Snapshot:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = snapshot_download(
                self.repo_id,
                revision=self.revision,
                cache_dir=self._options.cache_dir,
                local_files_only=True,
                allow_patterns=["config.json"],  # missing weights are reported when they are read
            )
        except (LocalEntryNotFoundError, HFValidationError) as error:
            at = f" at revision {self.revision!r}" if self.revision else ""
            raise ModelNotFoundError(
                f"{self.repo_id}{at} is not in the Hub cache, and cannot be downloaded in offline mode",
                hint="Unset HF_HUB_OFFLINE, or download the model first.",
            ) from error
        root = Path(folder)
        files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return Snapshot(root.name, _visible(files), offline=True)


def _snapshot_of(answer: bytes) -> Snapshot:
    """The commit and the files in the Hub's description of a repository. Raises InvalidJsonError."""
    document = parse_json(answer)
    if not isinstance(document, dict):
        raise InvalidJsonError(f"is {shown(document)}, not an object")
    commit, siblings = document.get("sha"), document.get("siblings")
    if not isinstance(commit, str) or not PLAIN_NAME.fullmatch(commit):
        raise InvalidJsonError(f"is {shown(commit)}, not a commit", "sha")
    if not isinstance(siblings, list):
        raise InvalidJsonError(f"is {shown(siblings)}, not a list", "siblings")
    names = [each.get("rfilename") if isinstance(each, dict) else None for each in siblings]
    return Snapshot(commit, _visible(iter(read_as(tuple[str, ...], names))), offline=False)


def _visible(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if not is_hidden(name)))


def quiet_huggingface_hub() -> None:
    """Silence its warnings, which would mix with our output on stderr. A verbosity that the user set is not changed."""
    logger = logging.getLogger("huggingface_hub")
    if logger.level == logging.WARNING:
        logger.setLevel(logging.ERROR)
