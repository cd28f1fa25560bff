"""What is known of labels from earlier loads, in one small file per verifier and version of what reads them.

A file is one line of SHA-256 of the rest, and then a line a label: the hash of its text, and what was found. It is
replaced whole, so that processes that load at the same time see an old file or a new one, and the later of two writers
keeps what the earlier one added but for what was written in between. A damaged file counts as none.
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from dppo_jax.errors import UserError
from dppo_jax.files import disk_path, make_folder

LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
# modules beside this one that decide what is found
READERS = ("extract", "labels", "maths", "notation", "numbers", "verifiers")
MOST = 1_000_000  # labels of a file: beyond them it begins anew
_LINE = re.compile("([0-9a-f]{32}) ([a-z]+)")


class LabelCache:
    """What was found of labels, by verifier. folder: "" keeps nothing.

    Where the folder cannot be used, a sentence on stderr says so: it saves time, and no load needs it.
    """

    def __init__(self, folder: str, verifier: str):
        self._file: Path | None = None
        if not folder:
            return
        try:
            place = disk_path(folder, "label_cache")
            make_folder(place)
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"the folder {str(place)!r} cannot be written")
            self._file = place / f"{verifier}-{_readers()}"
        except UserError as error:
            _warn(str(error).removeprefix("label_cache = "))

    def read(self) -> dict[str, str]:
        """Findings by `key`; {} where there is no whole file."""
        if self._file is None:
            return {}
        try:
            digest, _, text = self._file.read_text(encoding="ascii").partition("\n")
        except (OSError, ValueError):
            return {}
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return {}
        return {match[1]: match[2] for match in map(_LINE.fullmatch, text.splitlines()) if match}

    def add(self, found: Mapping[str, str]) -> None:
        """Keeps findings, by `key`, beside those that are there."""
        if self._file is None or not found:
            return
        kept = {**self.read(), **found}
        text = "".join(f"{name} {finding}\n" for name, finding in (kept if len(kept) <= MOST else found).items())
        partial = ""
        try:
            descriptor, partial = tempfile.mkstemp(prefix=f"{self._file.name}.", dir=self._file.parent)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            os.replace(partial, self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            _warn(f"{str(self._file.parent)!r}: {error.strerror}")


def key(label: str) -> str:
    """The hash of a label's text."""
    return hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _warn(reason: str) -> None:
    print(f"label_cache: {reason}; what is found of labels is not kept for later runs", file=sys.stderr)


@functools.cache
def _readers() -> str:
    """Of the libraries' versions, Python's, and our own modules' text: labels are read anew where one changes."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {[(name, version(name)) for name in LIBRARIES]}".encode())
    for name in READERS:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]
