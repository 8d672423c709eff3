"""The default texts that models are run on.

`sample.txt`, for calibration: Ruth, Jonah and Genesis 37-45. `held_out.txt`, for evaluation: Acts 1-16. They differ, so
that no model is evaluated on the text it was calibrated on. Both are from the King James Version (1611), English prose
in the public domain, from Debian's package bible-kjv-text: one paragraph for each chapter, without verse numbers.
"""

from importlib.resources import files

SAMPLE_NAME = "int8cli's sample (King James Version: Ruth, Jonah, Genesis 37-45)"
HELD_OUT_NAME = "int8cli's held-out sample (King James Version: Acts 1-16)"


def sample_text() -> bytes:
    """The text to calibrate on, in UTF-8."""
    return files(__name__).joinpath("sample.txt").read_bytes()


def held_out_text() -> bytes:
    """The text to evaluate on, in UTF-8."""
    return files(__name__).joinpath("held_out.txt").read_bytes()
