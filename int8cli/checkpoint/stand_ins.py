"""Files that are often found in place of weights: git-lfs pointers and web pages.

Owns how to recognise them. Knows no weight format.
"""

from int8cli.errors import CorruptShardError

HEAD_BYTES = 64  # enough of a file's start to recognise one

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype", b"<html", b"<?xml")


def refuse_stand_in(head: bytes, file_name: str) -> None:
    """Raise CorruptShardError if a file's first bytes are those of a git-lfs pointer or a web page."""
    if head.startswith(_LFS_POINTER):
        raise CorruptShardError(
            f"{file_name} is a git-lfs pointer, not the weights",
            hint="Run `git lfs pull` in the directory, or give the model's Hub id instead.",
        )
    if head.lstrip().lower().startswith(_MARKUP):
        raise CorruptShardError(
            f"{file_name} is a web page, not the weights",
            hint="The server's error page was saved under this name: download the file again.",
        )
