"""Fingerprints: short texts that differ where the weights or the prompts of two runs differ."""

import hashlib
import json
from collections.abc import Iterable

from dppo_jax.files import Path, files_in, read_ranges, size_of

WHOLE = 2**28  # bytes: of a larger file the beginning, the end and samples between are read
BLOCK, BLOCKS = 2**20, 256


def of_weights(directory: Path) -> str:
    """Of the safetensors files of a model directory, by name, size and bytes."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = size_of(path)
        digest.update(f"{path.name} {size}\n".encode())
        if size <= WHOLE:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            continue
        starts = [(size - BLOCK) * number // (BLOCKS - 1) for number in range(BLOCKS)]
        for part in read_ranges(path, starts, BLOCK):
            digest.update(part)
    return digest.hexdigest()[:16]


def of_files(folder: Path) -> str:
    """Of all files of a folder, by name and bytes."""
    digest = hashlib.sha256()
    for path in files_in(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


def of_text(text: str) -> str:
    """Of any text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def of_prompts(prompts: Iterable[tuple[list[int], str | list[str]]]) -> str:
    """Of token ids and gold answers, in their order."""
    digest = hashlib.sha256()
    for ids, answer in prompts:
        digest.update(json.dumps([ids, answer]).encode())
    return digest.hexdigest()[:16]
