"""What the options of each command can do about an error, by its class: the library's own hints name no option.

Of an error, the hint of the nearest class in its command's table is shown after the error's own.
"""

from int8cli.cli.errors import Hints

CONVERT: Hints = {}
ESTIMATE_MEMORY: Hints = {}
INSPECT_OUTLIERS: Hints = {}
VERIFY: Hints = {}
EVALUATE: Hints = {}
