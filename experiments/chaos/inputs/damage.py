"""Ways in which any file of JSON, or any file at all, can be other than it should.

A mutation changes a directory, with numbers drawn from `rng`, and says what must come of it.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Outcome:
    """refused: None if it must be loaded; else words of the sentence. eos: what the files name beside the tokenizer's
    own, where that is another set. same_parameters: whether these are still the same."""

    refused: tuple[str, ...] | None = None
    eos: tuple[int, ...] | None = None
    same_parameters: bool = True


SAME = Outcome()
Mutation = Callable[[random.Random, Path], Outcome]


def refused(*words: str) -> Outcome:
    return Outcome(refused=words)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def put(path: Path, **fields: Any) -> None:
    edit(path, lambda d: d | fields)


def tensors_of(folder: Path, change: Callable[[dict[str, np.ndarray]], Any], name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


# --- any file of JSON ---

BROKEN = {
    "empty": "",
    "blank": " \n",
    "cut": None,
    "a list": "[1, 2]",
    "text": '"config"',
    "null": "null",
    "a number": "3",
    "two values": "{} {}",
    "a lone surrogate": '{"a": "\\ud800"}',
    "a lone surrogate in a name": '{"\\udfff": 1}',
    "digits": '{"a": ' + "7" * 5000 + "}",
    "depth": "[" * 100_000 + "]" * 100_000,
    "depth of objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a byte order mark": "\ufeff{}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "zeros": b"\0" * 100,
    "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
}


def broken_json(name: str) -> Mutation:
    def mutation(rng: random.Random, folder: Path) -> Outcome:
        text = BROKEN[rng.choice(sorted(BROKEN))]
        path = folder / name
        if text is None:
            data = path.read_bytes()
            text = data[: rng.randrange(1, len(data) - 2)]
        elif isinstance(text, str):
            text = text.encode()
        path.write_bytes(text)
        return refused(name)

    return mutation


def no_file(name: str) -> Mutation:
    """Something else under its name."""

    def mutation(rng: random.Random, folder: Path) -> Outcome:
        path, kind = folder / name, rng.randrange(4)
        path.unlink()
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            path.symlink_to(path.name)
        elif kind == 2:
            path.symlink_to("nowhere")
        else:
            os.mkfifo(path)
        return refused(name)

    return mutation


def without(name: str) -> Mutation:
    def mutation(rng: random.Random, folder: Path) -> Outcome:
        (folder / name).unlink()
        return refused(name)

    return mutation
