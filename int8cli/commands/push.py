"""Push a conversion to a repository on the Hub: a finished one, or one shard after the other while it is made."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.hub.retries import RetryPolicy
from int8cli.checkpoint.hub.writable import PushTarget, WritableRepository
from int8cli.checkpoint.object_store import is_remote
from int8cli.checkpoint.writable_store import WritableStore
from int8cli.commands.checks import check_push
from int8cli.commands.options import ConvertOptions, PushOptions
from int8cli.conversion.part import PartRun
from int8cli.errors import OptionError
from int8cli.planning.survey import Survey
from int8cli.progress import SILENT, Progress
from int8cli.results.push import Pushed
from int8cli.upload.push import push_finished
from int8cli.upload.shard_upload import UploadFromWorker
from int8cli.upload.shard_uploads import ShardUploads
from int8cli.upload.target import Target
from int8cli.verification import conversion_in

_DEFAULTS = PushOptions()


@system_errors()
def push(
    directory: str | Path, repository: str, options: PushOptions = _DEFAULTS, *, progress: Progress = SILENT
) -> Pushed:
    """Push the conversion that `convert` wrote into `directory` to a repository on the Hub, as "name/model".

    The repository is created unless it exists. Files that it has are not sent again. All files appear in one commit.
    `repository` may also be an address in an object store. After an interruption, the same call goes on. Raises
    OutputError for a directory without a finished conversion, DestinationError for a repository that cannot take it,
    AccessDeniedError and TransferError.
    """
    check_push(options)
    directory = Path(directory)
    target = _target(repository, options, progress)
    conversion = conversion_in(directory, weights=False)
    return push_finished(directory, conversion, target, options.commit_message, progress)


@dataclass(frozen=True, slots=True)
class Push:
    """What a conversion is pushed to while it is made. `label` is its name in messages.

    `opens` opens it: every attempt at a conversion closes its own.
    """

    label: str
    opens: Callable[[], Target]
    message: str | None
    keep_output: bool
    progress: Progress

    def destination(self, output: Path, survey: Survey, part: PartRun | None = None) -> ShardUploads:
        """Uploads what is converted into `output`: all, or the shards of a part."""
        names = tuple(survey.outputs) if part is None or part.share is None else part.shards(survey)
        sizes, token = _sizes(survey, names), None if part is None else part.token
        return ShardUploads(
            self.opens(), output, sizes, self.message, self.progress, keep_output=self.keep_output, token=token
        )


def push_of(options: ConvertOptions, progress: Progress) -> Push | None:
    """What the options of a conversion say of pushing it; None without a repository. Makes no request."""
    if (options.push_to_hub or options.push_to) is None:
        return None
    opens = partial(_target_of, options, progress)
    return Push(opens().label, opens, options.commit_message, options.keep_output, progress)


def hand_on_of(options: ConvertOptions) -> UploadFromWorker | None:
    """The same for what a worker of a cluster has converted."""
    if (options.push_to_hub or options.push_to) is None:
        return None
    return UploadFromWorker(partial(_target_of, options, SILENT), options.keep_output)


def _target_of(options: ConvertOptions, progress: Progress) -> WritableRepository | WritableStore:
    name = options.push_to_hub or options.push_to or ""
    how = PushOptions(options.private, options.push_revision, options.commit_message, options.retry_for)
    return _target(name, how, progress, revision_option="push_revision")


def _target(
    name: str, options: PushOptions, progress: Progress, *, revision_option: str = "revision"
) -> WritableRepository | WritableStore:
    def waiting(what: str, why: str, pause_s: float) -> None:
        progress.note(f"{what}: {why}; trying again in {pause_s:.0f} s")

    policy = RetryPolicy(patience_s=options.retry_for)
    if is_remote(name):
        given = {
            "private": options.private,
            revision_option: options.revision,
            "commit_message": options.commit_message,
        }
        for option in (each for each, value in given.items() if value):
            raise OptionError("object stores have no such option", option=option)
        return WritableStore(name, policy, waiting)
    return WritableRepository(PushTarget(name, options.revision, options.private, retry=policy, on_wait=waiting))


def _sizes(survey: Survey, names: Collection[str]) -> Mapping[str, int]:
    """The bytes to upload for each of these source files, by its output."""
    sizes = {}
    for name in names:
        output, sidecar = survey.outputs[name], survey.sidecars.get(name)
        sizes[output.file_name] = output.file_bytes + (0 if sidecar is None else sidecar.file_bytes)
    return sizes
