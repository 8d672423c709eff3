"""The text that calibration runs on where the user names none.

`sample.txt`: Ruth, Jonah and Genesis 37-45 from the King James Version (1611), one chapter a paragraph, 60 kB of
English prose. It is in the public domain; taken from Debian's package bible-kjv-text, verse numbers left out.
"""

from importlib.resources import files

SAMPLE_NAME = "int8cli's sample (King James Version: Ruth, Jonah, Genesis 37-45)"


def sample_text() -> bytes:
    """The text, in UTF-8."""
    return files(__name__).joinpath("sample.txt").read_bytes()
