"""Imports what all processes of a conversion need, in the server that they are forked from.

Importing this module does the work. Forked processes then start at once and share the memory of these modules.
"""

import gc
from importlib import import_module

from int8cli.workers.torch_start import start_torch

start_torch()
import_module("int8cli.conversion.shard")
import_module("int8cli.outliers.suspects")
gc.freeze()  # otherwise the collector writes to these objects, and their pages are no longer shared
