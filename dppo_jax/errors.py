"""Errors that are the user's to mend: one sentence that names the offending thing and the nearest right one."""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input. Entry points print its sentence and exit with status 2; see `run_main`."""


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; the nearest is 'x'" or, with nothing close, "; known: a, b" for the end of a sentence."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else f"; known: {', '.join(known)}"


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """table[name], or a `UserError` such as "unknown loss 'cispoo'; the nearest is 'cispo'"."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}{nearest(name, table)}")
    return table[name]


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for the end of a sentence."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Runs an entry point; a `UserError` becomes one line on stderr and exit status 2, an interruption status 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
