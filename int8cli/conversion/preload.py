"""What the processes of a conversion have in common, imported once in the server that they are forked from.

To import this is to do it. Forked processes start at once, and share the memory of all that is imported here.
"""

import gc
import os
from importlib import import_module

from int8cli.workers.torch_start import start_torch

try:
    start_torch()
    import_module("int8cli.conversion.shard")
    import_module("int8cli.outliers.suspects")
except (OSError, ImportError, MemoryError):  # the system gives no more of something
    os._exit(1)  # without a traceback: who asks this server for a process finds it gone, and says so
gc.freeze()  # the collector writes into what it looks at, and a page that is written to is no longer shared
