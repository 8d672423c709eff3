"""Imports what all processes of a conversion need, in the server that they are forked from.

Importing this module does the work. Forked processes then start at once and share the memory of these modules.
"""

import gc
import os
from importlib import import_module

from int8cli.workers.torch_start import start_torch

try:
    start_torch()
    import_module("int8cli.conversion.shard")
    import_module("int8cli.outliers.suspects")
except (OSError, ImportError, MemoryError):  # no memory or no descriptors left
    os._exit(1)  # without a traceback: the process that asks this server for a worker reports that it has ended
gc.freeze()  # otherwise the collector writes to these objects, and their pages are no longer shared
