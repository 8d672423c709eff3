"""`int8cli push`."""

import json
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import CommitMessage, ConvertedDirectory, Json, Private, Quiet, RetryFor, options_of
from int8cli.commands.options import RETRY_FOR_S, PushOptions

EXAMPLES = """\
int8cli push ./bloom-int8 your-name/bloom-int8
int8cli push ./my-model-int8 your-name/my-model-int8 --private
int8cli push ./my-model-int8 s3://bucket/my-model-int8
int8cli push ./my-model-int8 your-name/my-model-int8 --revision v2 --commit-message 'with outlier columns'
"""

Repository = Annotated[
    str,
    typer.Argument(
        metavar="REPO",
        help="A repository on the Hub, NAMESPACE/NAME, created if missing; or an address (s3://bucket/model).",
        show_default=False,
    ),
]
Branch = Annotated[
    str | None,
    typer.Option("--revision", help="Branch to push to; created if missing.", show_default="main", metavar="REV"),
]


@shows_errors(hints.PUSH, resumes=True)
def push(
    directory: ConvertedDirectory,
    repository: Repository,
    private: Private = False,
    revision: Branch = None,
    commit_message: CommitMessage = None,
    retry_for: RetryFor = RETRY_FOR_S,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push a finished conversion to a repository on the Hub, in one commit, or to an object store.

    Shards are compared with the digests taken when they were written, and uploaded one at a time; what the repository
    has is not sent again. The model appears whole or not at all. After an interruption, run the same command again.
    """
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import push as command
    from int8cli.report.text import printable
    from int8cli.results.units import counted, human_bytes

    options = options_of(PushOptions, locals())
    with shown_progress(quiet=quiet) as progress:
        found = command.push(directory, repository, options, progress=progress)
    with writing_result():
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        elif not quiet:
            done = "is now" if found.new else "was already"
            at = (
                f"{found.repository} at {found.revision}, commit {found.commit}" if found.revision else found.repository
            )
            print(printable(f"{directory} {done} {at}"))
            all_files = f"{counted(found.files, 'file')}, {human_bytes(found.bytes)}"
            print(printable(f"{all_files}; {human_bytes(found.uploaded_bytes)} sent"))
