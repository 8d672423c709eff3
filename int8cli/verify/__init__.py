"""Verify: whether an output is complete, loads, and is what its source becomes."""

from int8cli.verify.options import VerifyOptions
from int8cli.verify.run import VerifyObserver, conversion_in, verify

__all__ = ["VerifyObserver", "VerifyOptions", "conversion_in", "verify"]
