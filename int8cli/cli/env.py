"""`int8cli env`."""

import json

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import Json

EXAMPLES = """\
int8cli env
int8cli env --json
"""


@shows_errors(hints.ENV)
def env(as_json: Json = False) -> None:
    """Show what a bug report needs: versions, processor, memory, GPUs, disk, Hub settings without the token."""
    from int8cli.commands import env as command
    from int8cli.report.environment import show_environment

    found = command.env()
    with writing_result():
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            show_environment(found)
