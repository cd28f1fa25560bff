"""Errors that are the user's to mend: one sentence that names the offending thing and the nearest right one."""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO, TypeVar

from dppo_jax.arenas import share_memory

T = TypeVar("T")

# A quoted text, or a word.
_PIECE = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1)[^\\])*\1|\S+""", re.DOTALL)
MOST_LETTERS, MOST_OF_A_WORD = 200, 500  # a word may be a path, or a command with several
MOST_KNOWN = 20  # names, where none is near


class UserError(ValueError):
    """Bad input. Entry points print its sentence and exit with its status; see `run_main`.

    What the sentence quotes may have come from anywhere: longer than MOST_LETTERS it has its middle left out, and so
    has a word of more than MOST_OF_A_WORD.
    """

    status = 2

    def __init__(self, sentence: str):
        super().__init__(_PIECE.sub(lambda piece: _shortened(piece[0]), sentence))


def _shortened(text: str) -> str:
    most = MOST_LETTERS if text[0] in "'\"" else MOST_OF_A_WORD
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


class Stopped(UserError):
    """A run was asked to stop, and has saved what it needs to go on: status 75, "try again" in sysexits.h."""

    status = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; the nearest is 'x'" or, with nothing close, "; known: a, b" for the end of a sentence."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    close = close or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if close:
        return f"; the nearest is {close[0]!r}"
    more = f" and {len(known) - MOST_KNOWN} more" if len(known) > MOST_KNOWN else ""
    return f"; known: {', '.join(known[:MOST_KNOWN])}{more}"


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """table[name], or a `UserError` such as "unknown loss 'cispoo'; the nearest is 'cispo'"."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}{nearest(name, table)}")
    return table[name]


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for the end of a sentence."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def reason(error: BaseException) -> str:
    """What the system said of a file, short enough for the end of a sentence."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


# What reads and writes buckets, and nothing else here.
_CLIENTS = ("fsspec", "gcsfs", "s3fs")


def of_bucket(error: BaseException) -> bool:
    """Whether an error came out of a client of buckets: one is not there, closed to us, or out of reach."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] in _CLIENTS for module in modules)


def of_files(error: BaseException) -> bool:
    """Whether an error is of a disk or of a bucket."""
    return isinstance(error, OSError) or of_bucket(error)


class WriteError(UserError):
    """A run's folder can no longer be written: the disk is full, the folder is gone, a limit is reached."""


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside, or one of a bucket, becomes a `WriteError` that names the folder and the reason."""
    try:
        yield
    except Exception as error:
        if not of_files(error):
            raise
        raise WriteError(f"cannot write to {os.fspath(folder)!r}: {reason(error)}") from error


class _Sturdy(io.TextIOBase):
    """A stream that goes silent when nobody reads it any more, in place of ending the program."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silenced():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # a broken pipe, a terminal that is gone, a full disk; a closed file
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextlib.contextmanager
def sturdy_streams() -> Iterator[None]:
    """Until it closes, a reader of stdout or stderr who goes away (`2>&1 | head`), or never came, stops nothing."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (_Sturdy(nowhere if stream is None else stream) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def run_main(main: Callable[[], None]) -> None:
    """Runs an entry point; a `UserError` becomes one line on stderr and its exit status, an interruption status 130."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    share_memory()
    with sturdy_streams():
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.status)
        except Exception as error:
            if not of_bucket(error):
                raise
            print(f"error: a bucket fails: {type(error).__name__}: {first_line(error):.300}", file=sys.stderr)
            sys.exit(2)
