"""Runs a tool as `mas` runs its commands: what is wrong is said in one line."""

from collections.abc import Callable


def run_tool(main: Callable[[], None]) -> None:
    """Calls a tool; an error of its input or files ends it with status 1 and no traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
