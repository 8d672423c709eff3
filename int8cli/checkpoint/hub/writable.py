"""A repository on the Hub that is written to: its files' bytes are uploaded one by one, then one commit names them all.

Owns the order that makes the commit whole, and safe to repeat. huggingface_hub uploads and commits. Knows no file by
its meaning.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from int8cli.checkpoint.hub.failures import TRY_AGAIN, MalformedAnswerError, OutdatedRequestError, is_foreign
from int8cli.checkpoint.hub.lfs import LfsObject, LfsServer
from int8cli.checkpoint.hub.options import request_headers
from int8cli.checkpoint.hub.push_file import (
    Commit,
    PushFile,
    Uploaded,
    addition_of,
    is_there,
    named,
    refuse_foreign_weights,
    without_bars,
)
from int8cli.checkpoint.hub.repository import quiet_huggingface_hub
from int8cli.checkpoint.hub.retries import Retries, RetryPolicy
from int8cli.checkpoint.hub.upload_failures import cause_of, is_refusal, outdated, upload_error
from int8cli.errors import AccessDeniedError, DestinationError, Int8cliError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")

MAIN = "main"
# Asked for to learn whether the token may write, and never sent.
_PROBE = LfsObject("cb1525bced78da2c03c42fe15bf15663b584566ef6244ff91d892caa011fec1e", 4)


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Which repository to write to, and how.

    `revision` is a branch, None for main; it is created if it is missing. `private`: a new repository is private, and
    a public one is refused. `on_wait(what, why, pause_s)` hears of each pause before a retry.
    """

    repo_id: str
    revision: str | None = None
    private: bool = False
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    on_wait: Callable[[str, str, float], None] | None = None


class WritableRepository:
    """A repository that files are uploaded to. `prepare` must have been called; `upload` may run in another thread.

    Every method raises AccessDeniedError for a missing or insufficient token, DestinationError for a repository that
    takes nothing more, and TransferError after retries that all failed.
    """

    def __init__(self, options: PushTarget) -> None:
        """Makes no request. Raises DestinationError for a name that no repository has."""
        self.name = _checked_id(options.repo_id)
        self.revision = options.revision or MAIN
        self._options = options
        self._stop = Event()

    @property
    def label(self) -> str:
        """The name of the repository in messages."""
        return self.name if self.revision == MAIN else f"{self.name} at {self.revision}"

    @property
    def directory(self) -> None:
        """It is not on this machine."""

    def prepare(self, ours: Sequence[str]) -> None:
        """Create the repository and the branch unless they exist, and check that the token may write there.

        Raises DestinationError for a repository with weights that are not among the files `ours`.
        """
        from huggingface_hub import get_token

        quiet_huggingface_hub()
        if self._options.token is None and get_token() is None:
            raise AccessDeniedError(
                f"{self.name}: writing to the Hub needs a token", hint="Set HF_TOKEN or run `hf auth login`."
            )
        self._call(self._require_repository, self.name)
        self._call(self._require_branch, self.label)
        self._call(lambda: self._lfs().missing([_PROBE], self.label), self.label)
        refuse_foreign_weights(self.label, self.states(), ours)

    def claim(self, conversion: PushFile) -> None:
        """Nothing to do: one commit replaces the files of a model."""

    def missing(self, files: Sequence[PushFile]) -> set[str]:
        """The names of the files whose bytes the repository does not have."""
        objects = [file.lfs for file in files]
        missing = self._call(lambda: self._lfs().missing(objects, self.label), self.label)
        return {file.name for file in files if file.sha256 in missing}

    def upload(self, file: PushFile) -> Uploaded:
        """Upload a file that is here, unless the repository has its bytes. They are not visible before a commit."""
        what = f"{self.label}: {file.name}"
        if not self._call(lambda: self._lfs().missing([file.lfs], what), what):
            return Uploaded("had")
        operation = addition_of(file)
        self._call(lambda: self._preupload([operation]), what)
        file.require_unchanged()
        return Uploaded("sent" if operation._is_uploaded else "for the commit")

    def commit(self, files: Sequence[PushFile], message: str) -> Commit:
        """Make one commit that adds all of these files, unless they are all there.

        Raises DestinationError for a repository with other weights, for bytes that it has lost since they were
        uploaded, and if a file is missing afterwards.
        """
        commit = self._call(lambda: self._commit(files, message), self.label)
        self._require_all(files, self.states(commit.oid))
        return commit

    def states(self, revision: str | None = None) -> dict[str, tuple[str, ...]]:
        """For every file of the repository the digests that identify its bytes: a sha256, or the sha1 of git."""
        from huggingface_hub.hf_api import RepoFile

        def read() -> dict[str, tuple[str, ...]]:
            entries = self._api().list_repo_tree(self.name, recursive=True, revision=revision or self.revision)
            files = [each for each in entries if isinstance(each, RepoFile)]
            return {each.path: (each.lfs.sha256,) if each.lfs else (each.blob_id,) for each in files}

        return self._call(read, self.label)

    def close(self) -> None:
        """End the wait before a retry. An upload that is under way ends with the process."""
        self._stop.set()

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(self._options.endpoint, token=self._options.token, library_name="int8cli")

    def _lfs(self) -> LfsServer:
        from huggingface_hub import constants

        url = f"{self._options.endpoint or constants.ENDPOINT}/{self.name}"
        headers = request_headers(self._options.token)
        return LfsServer(url, self.revision, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def _require_repository(self) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            found = self._api().repo_info(self.name)
        except RepositoryNotFoundError:
            if self._create():
                return
            found = self._api().repo_info(self.name)
        if self._options.private and not found.private:
            raise DestinationError(
                f"{self.name} exists and is public", hint="Choose another name, or make the repository private."
            )

    def _create(self) -> bool:
        """Whether this call has made the repository. False if somebody else has meanwhile.

        With `exist_ok`, huggingface_hub reads an address from the refusal, which not every server sends.
        """
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._api().create_repo(self.name, private=True if self._options.private else None)
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.CONFLICT:
                raise
            return False
        return True

    def _require_branch(self) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        if self.revision == MAIN:
            return
        try:
            self._api().repo_info(self.name, revision=self.revision)
        except RevisionNotFoundError:
            if self.revision.startswith("refs/"):
                raise
            self._api().create_branch(self.name, branch=self.revision, exist_ok=True)

    def _preupload(self, operations: "Sequence[CommitOperationAdd]") -> None:
        with without_bars():
            self._api().preupload_lfs_files(
                self.name, operations, revision=self.revision, free_memory=False, num_threads=1
            )

    def _commit(self, files: Sequence[PushFile], message: str) -> Commit:
        """One attempt. What an attempt whose answer was lost has committed is not committed again."""
        there = self.states()
        refuse_foreign_weights(self.label, there, [file.name for file in files])
        new = [file for file in files if not is_there(file, there)]
        if not new:
            return Commit(self._head(), made=False)
        lost = self.missing([file for file in new if file.path is None])
        if lost:
            raise DestinationError(
                f"{self.label}: the Hub no longer has the bytes of {named(sorted(lost))}", hint=TRY_AGAIN
            )
        try:
            return Commit(_unwrapped(lambda: self._create_commit(new, message), self.label), made=True)
        except OutdatedRequestError as error:
            state = None if error.state is None else self._head()
            raise OutdatedRequestError(str(error), state=state) from error

    def _create_commit(self, files: Sequence[PushFile], message: str) -> str:
        """Returns the hash of the commit."""
        operations = [addition_of(file) for file in files]
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the card's metadata: the Hub shows them on the model's page
            info = self._api().create_commit(
                self.name, operations, commit_message=message, revision=self.revision, num_threads=1
            )
        return info.oid

    def _head(self) -> str:
        """The last commit of the branch."""
        return str(self._api().repo_info(self.name, revision=self.revision).sha)

    def _require_all(self, files: Sequence[PushFile], there: dict[str, tuple[str, ...]]) -> None:
        missing = [file.name for file in files if not is_there(file, there)]
        if missing:
            raise DestinationError(
                f"{self.label}: the commit lacks {named(missing)}",
                hint="Check .gitignore in the repository, and who else writes to it.",
            )

    def _call(self, request: Callable[[], T], what: str) -> T:
        """The result of a request that is repeated after transient failures."""
        retries = Retries(self._options.retry, what, self._stop, self._options.on_wait, upload_error)
        return retries.call(lambda: _unwrapped(request, what))


def _unwrapped(request: Callable[[], T], what: str) -> T:
    """The result of a request, or the error of the network or server that made it fail."""
    try:
        return request()
    except Int8cliError:
        raise
    except Exception as error:
        cause = cause_of(error)
        if isinstance(cause, json.JSONDecodeError):  # huggingface_hub reads some answers before their status
            raise MalformedAnswerError("the server's answer is not JSON") from error
        if (late := outdated(cause)) is not None:
            raise late from error
        if not is_foreign(cause) and is_refusal(cause):
            raise upload_error(cause, what) from error
        raise cause from None


def _checked_id(repo_id: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not marked so

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        valid = False
    else:
        valid = "/" in repo_id
    if not valid:
        raise DestinationError(
            f"{repo_id!r} is not the name of a repository on the Hub", hint="Its form is NAMESPACE/NAME."
        )
    return repo_id
