"""The names in `int8/` of what is no file of the conversion: its description, the records, and what is unfinished."""

from pathlib import PurePosixPath

from int8cli.checkpoint.output_names import CONVERSION_FILE

CONVERSION = PurePosixPath(CONVERSION_FILE).name
RECORDS = "records"
UPLOADS = "uploads"
COMMIT = "push.json"
PARTIAL = "partial"
INCOMING = "incoming"
CALIBRATION = "calibration"
PARTS = "parts"
ALL = frozenset({CONVERSION, RECORDS, UPLOADS, COMMIT, PARTIAL, INCOMING, CALIBRATION, PARTS})
