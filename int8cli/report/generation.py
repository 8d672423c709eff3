"""The figures of a generation, after its text: speed, memory, agreement with 16 bit."""

from int8cli.report.text import printable, printable_lines
from int8cli.results.generation import Agreement, Generation, Stopped
from int8cli.results.units import counted, human_bytes

_ENDINGS: dict[Stopped, str] = {"end": "", "length": ", stopped at the limit", "interrupted": ", interrupted"}


def generation_lines(found: Generation) -> list[str]:
    """Lines for a terminal."""
    lines = [speed_line(found), memory_line(found)]
    return lines if found.agreement is None else [*lines, "", *_agreement_lines(found, found.agreement)]


def speed_line(found: Generation) -> str:
    if found.seconds_to_first_token is None:
        return f"interrupted before the first token after a prompt of {found.prompt_tokens}"
    rate = "" if found.tokens_per_second is None else f", then {found.tokens_per_second:.1f} tokens/s"
    return (
        f"{counted(found.new_tokens, 'token')} after a prompt of {found.prompt_tokens}: the first in "
        f"{found.seconds_to_first_token:.2f} s{rate}{_ENDINGS[found.stopped]}"
    )


def memory_line(found: Generation) -> str:
    peaks = [
        f"{human_bytes(peak)} {where}"
        for peak, where in ((found.peak_memory_bytes, "resident"), (found.peak_gpu_bytes, "on the GPU"))
        if peak is not None
    ]
    return f"{human_bytes(found.weights_bytes)} of weights in memory; at most {' and '.join(peaks) or 'not known'}"


def _agreement_lines(found: Generation, agreement: Agreement) -> list[str]:
    share = found.weights_bytes / agreement.weights_bytes
    rate = "" if agreement.tokens_per_second is None else f", {agreement.tokens_per_second:.1f} tokens/s"
    if agreement.first_difference is None:
        differs = f"the same {found.new_tokens} tokens"
    else:
        differs = f"token {agreement.first_difference + 1} of {found.new_tokens} is the first that differs"
    return [
        f"{printable(agreement.source)} in 16 bit, {human_bytes(agreement.weights_bytes)} of weights{rate}:",
        printable_lines(agreement.text),
        "",
        f"{differs}; given the same words before it, 16 bit would choose {agreement.agreeing_tokens} of the "
        f"{found.new_tokens} tokens too",
        f"the int8 weights take {100 * share:.0f} % of the memory of the 16-bit weights",
    ]
