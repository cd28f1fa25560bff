"""The files beside a model's weights that make it the policy it is: which tokens end a response, the tokenizer, chat
templates. What is read from one model directory goes into the next as it is; and a directory changes whole or not at
all."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from dppo_jax.files import Path, copy_file, files_in, is_bucket, is_file, make_folder, read_json_object

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
STAGING = ".saving-"  # how the name begins of a folder whose files are not in their place yet
TEMPLATES = "additional_chat_templates"  # a folder: one file for each

# What config.json says of the file that it was, and not of the model.
OF_THE_FILE = frozenset(
    "dtype torch_dtype use_bfloat16 torchscript transformers_version _name_or_path name_or_path _commit_hash "
    "use_cache".split()
)


def token_fields(tokenizer: Any, source: dict[str, Any], eos_ids: Sequence[int]) -> dict[str, Any]:
    """config.json's bos_token_id, eos_token_id and pad_token_id: `eos_ids`, and otherwise those of the source's
    config.json or else the tokenizer's."""
    fields = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = source.get(name)
        if fields[name] is None and tokenizer is not None:
            fields[name] = getattr(tokenizer, name)
    return fields | ({"eos_token_id": _one_or_all(eos_ids)} if eos_ids else {})


def write_generation_config(staging: pathlib.Path, source: Path | None, tokens: dict[str, Any]) -> None:
    """generation_config.json: the source's, byte for byte if it names every token that ends a response, and else with
    these added; without one, a file of the token ids alone, if they are known.

    Raises: UserError where the source's cannot be read.
    """
    ends = _listed(tokens["eos_token_id"])
    if source is not None and is_file(source / GENERATION):
        fields = read_json_object(source / GENERATION)
        listed = _listed(fields.get("eos_token_id"))
        lacking = [token for token in ends if token not in listed]
        if not lacking:
            copy_file(source / GENERATION, staging / GENERATION)
            return
        fields["eos_token_id"] = _one_or_all([*listed, *lacking])
    elif ends:
        fields = {name: value for name, value in tokens.items() if value is not None}
    else:
        return
    (staging / GENERATION).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(staging: pathlib.Path, source: Path | None, tokenizer: Any) -> None:
    """The tokenizer's files: the source's as they are, or what the tokenizer itself writes."""
    if source is None:
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        return
    for name in TOKENIZER:
        if is_file(source / name):
            copy_file(source / name, staging / name)
    for path in sorted((source / TEMPLATES).glob("*.jinja")):
        (staging / TEMPLATES).mkdir(exist_ok=True)
        copy_file(path, staging / TEMPLATES / path.name)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[pathlib.Path]:
    """A folder of this machine for new files of `directory`, which is made; gone when the `with` ends, or when the next
    one begins, if this one was killed. UserError."""
    make_folder(directory)
    inside = directory if isinstance(directory, pathlib.Path) else None  # so that files are moved, not copied
    for left in inside.glob(f"{STAGING}*") if inside else ():
        shutil.rmtree(left, ignore_errors=True)
    name = tempfile.mkdtemp(prefix=STAGING, dir=inside)
    try:
        yield pathlib.Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def remove(directory: Path, names: Sequence[str]) -> None:
    """What is there of these, in their order. OSError."""
    for name in names:
        (directory / name).unlink(missing_ok=True)


def publish(
    staging: pathlib.Path, directory: Path, weights: str, replaces: Sequence[str] = (), config: str = CONFIG
) -> None:
    """Moves all files of `staging` into `directory`, `config` last, without which nothing loads a model.

    An old config goes first if anything changes but `weights`, a single file, so that a kill leaves the old model, the
    new one, or none; in a bucket it always goes first. `replaces`: names that are removed where they are not among the
    new files.
    """
    new_files = [path.relative_to(staging) for path in files_in(staging)]
    old_files = [path.relative_to(directory) for name in replaces for path in _files(directory / name)]
    gone = [name for name in old_files if name not in new_files]
    if is_bucket(directory) or gone or any(
        _differ(staging / name, directory / name) for name in new_files if str(name) != weights
    ):
        (directory / config).unlink(missing_ok=True)
    for name in gone:
        (directory / name).unlink()
    for name in sorted(new_files, key=lambda name: str(name) == config):
        if is_bucket(directory):
            copy_file(staging / name, directory / name)
        else:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, directory / name)


def _files(path: Path) -> list[Path]:
    """The file of this name or, in a folder, all of them."""
    if is_bucket(path):
        return files_in(path)
    if path.is_dir() and not path.is_symlink():
        return [inner for inner in path.rglob("*") if not inner.is_dir()]
    return [path] if os.path.lexists(path) else []


def _differ(new: Path, old: Path) -> bool:
    if new.suffix == ".safetensors":  # one of several, too large to be compared
        return True
    return not old.is_file() or old.read_bytes() != new.read_bytes()


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _one_or_all(ids: Sequence[int]) -> int | list[int]:
    return list(ids) if len(ids) > 1 else ids[0]
