"""Verify: whether an output is complete, loads, and is what its source becomes."""

from int8cli.verification.options import VerificationRun
from int8cli.verification.run import conversion_in, verify

__all__ = ["VerificationRun", "conversion_in", "verify"]
