"""The layout of a conversion, from its settings."""

from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.errors import OutputError
from int8cli.planning.layouts import LAYOUTS, Layout, layout_of
from int8cli.records.conversion import Conversion
from int8cli.typed_json import shown


def target_of(conversion: Conversion) -> Layout:
    """Raises OutputError for a layout that this version does not know."""
    settings = conversion.settings
    found = layout_of(settings.layout, settings.inputs)
    if found is None:
        raise OutputError(
            f"{CONVERSION_FILE} names the layout {shown(settings.layout)} with the inputs {shown(settings.inputs)}, "
            f"this version supports only {' and '.join(LAYOUTS)}"
        )
    return found
