"""Warnings about a plan: likely mistakes, and what the user should know before converting."""

from collections.abc import Iterator

from int8cli.planning.survey import Survey


def warnings_of(survey: Survey) -> Iterator[str]:
    """Warnings about a survey, one line each."""
    for pattern in survey.plan.unmatched_patterns:
        yield f"warning: no module matches {pattern!r}"
    if not survey.plan.quantized:
        yield "warning: no layer becomes int8; the plan has the reason for each"
    if not survey.has_config:
        yield "warning: the checkpoint has no config.json; loaders need one with a quantization_config"
    for caveat in survey.target.caveats(survey.plan, survey.config):
        yield f"warning: {caveat}"
    if survey.scaled_tensors:
        yield (
            f"the source is in 8-bit floats: {survey.scaled_tensors:,} tensors are read as the floats that they stand "
            "for, and keep the error of that rounding; a 16-bit original gives better int8"
        )
    for contents in survey.shards:
        if not contents.mappable:
            yield f"{contents.file_name}: a .bin in the legacy format cannot be read in pieces, so it is loaded whole"
