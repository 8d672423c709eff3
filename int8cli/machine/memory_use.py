"""How much memory this process has taken, as the system counts it."""

import resource
import sys


def peak_memory_bytes() -> int:
    """The peak resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
