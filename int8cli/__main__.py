"""Where the program starts, as `int8cli` and as `python -m int8cli`."""

import sys

# Those of int8cli.cli.errors, which may be what cannot be imported.
_EXIT_ERROR, _EXIT_INTERRUPTED = 1, 130


def main() -> None:
    """Run the command line. Its modules are imported here, so that a failure to import them is reported too."""
    try:
        from int8cli.cli import main as command_line
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)
    except (
        ImportError,
        MemoryError,
        OSError,
        RuntimeError,
        SystemError,
    ) as error:  # SystemError: Python, out of memory
        reason = str(error) or type(error).__name__
        sys.stderr.write(
            f"error: int8cli cannot start: {reason}\n"
            "hint: Check the limits on memory and open files (ulimit -a), or install int8cli again.\n"
        )
        sys.exit(_EXIT_ERROR)
    command_line()


if __name__ == "__main__":
    main()
