"""Checks of a conversion: it is complete, it loads, and it matches its source."""

from int8cli.verification.options import VerificationRun
from int8cli.verification.run import conversion_in, verify

__all__ = ["VerificationRun", "conversion_in", "verify"]
