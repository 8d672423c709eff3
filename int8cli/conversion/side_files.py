"""The files of a finished conversion beside its shards, as `int8/files.json` must name them: all, and no others.

Owns which these are. Reads none of them.
"""

from pathlib import Path

from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.errors import OutputError
from int8cli.planning.output_files import CARD_FILE, sidecar_file_name
from int8cli.records.conversion import Conversion
from int8cli.records.manifest import MANIFEST_FILE, SideFile, read_manifest


def side_file_names(conversion: Conversion) -> tuple[str, ...]:
    """All files but the shards, their sidecars, the card, which users edit, and the manifest itself."""
    apart = {CARD_FILE, MANIFEST_FILE}
    for shard in conversion.shards:  # a planned sidecar may not exist, if its only layers were not finite
        apart |= {shard.output, sidecar_file_name(shard.output)}
    return tuple(name for name in conversion.files if name not in apart)


def complete_manifest(directory: Path, conversion: Conversion) -> tuple[SideFile, ...]:
    """The manifest of the conversion in `directory`. Raises OutputError unless it names these files and no others."""
    manifest = read_manifest(directory) or ()
    differing = {file.file for file in manifest} ^ set(side_file_names(conversion))
    if differing:
        raise OutputError(
            f"{directory / MANIFEST_FILE} and {CONVERSION_FILE} name different files: {min(differing)} is in one only",
            hint="One of them was edited. Run the same convert command again to rewrite the first.",
        )
    return manifest
