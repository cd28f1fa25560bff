"""Models and data sets of the Hugging Face hub by name: which of their files, at which commit, fetched into the cache
of huggingface_hub.

Only what is read is fetched: no code, no pickles. What the cache holds of a commit is not asked for again, so that a
second run needs no network. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT act as in huggingface_hub.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax.errors import UserError, first_line, nearest
from dppo_jax.files import shown

WEIGHTS, SHARDS = "model.safetensors", "model-*.safetensors"
BESIDE = ("*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")
TEMPLATES = "additional_chat_templates/*.jinja"
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
COMMIT = re.compile(r"[0-9a-f]{40}")

_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![-.])", re.ASCII)
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?")  # train-00000-of-00002, or with a hash behind
_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
_KINDS = {"model": "model", "dataset": "data set"}

Subsets = dict[str, dict[str, list[str]]]  # paths in a repository by subset and split


class Model(NamedTuple):
    """A model's files in the cache, and the commit that they are of."""

    folder: Path
    commit: str  # 40 hexadecimal digits


class Shards(NamedTuple):
    """The files of rows of one split in the cache, in order, and the commit that they are of."""

    files: list[Path]  # all *.parquet, or all *.jsonl
    commit: str


def is_name(text: str) -> bool:
    """Whether a text can be a repository's name, ORG/NAME."""
    return len(text) <= 96 and _NAME.fullmatch(text) is not None


def commit_of(kind: str, name: str, revision: str = "") -> str:
    """The commit that a branch or tag ("": the main branch) of a model or dataset is now, or was when it was last asked
    for, where the hub cannot be reached. A commit is itself. UserError."""
    if not is_name(name):
        raise UserError(f"{shown(name)} is no name of a {_KINDS[kind]} on the hub: write ORG/NAME")
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with _told(kind, name, revision):
        return HfApi().resolve_revision(name, repo_type=kind, revision=revision or None).resolved


def model_directory(name: str, revision: str = "") -> Model:
    """A model's safetensors, JSON and tokenizer files, those at the top of its repository and further chat templates.

    revision: a branch, a tag or a commit; "": the main branch.
    Raises: UserError where it is not there, cannot be read or reached, or has no safetensors.
    """
    repository = _open("model", name, revision)
    top = [path for path in repository.sizes if "/" not in path]
    weights = [path for path in top if path == WEIGHTS] or [path for path in top if fnmatchcase(path, SHARDS)]
    if not weights:
        raise UserError(
            f"the model {name!r} on the hub has no model.safetensors, nor shards of it; it has {_some(top)}"
        )
    beside = [path for path in top if any(fnmatchcase(path, pattern) for pattern in BESIDE)]
    beside += [path for path in repository.sizes if fnmatchcase(path, TEMPLATES)]
    return Model(repository.fetch([*weights, *beside])[0].parent, repository.commit)


def model_config(name: str, revision: str = "") -> Path:
    """A model's config.json alone. UserError."""
    return _open("model", name, revision).fetch(["config.json"])[0]


def dataset_files(name: str, subset: str = "", split: str = "train", revision: str = "") -> Shards:
    """The parquet files of a data set's split or, where it has none, its JSONL files.

    subset: may be "" where there is one, or one is the default. revision: as of `model_directory`.
    Raises: UserError where it is not there, cannot be read or reached, or has no such subset, split or files.
    """
    repository = _open("dataset", name, revision)
    card: Any = {}
    if "README.md" in repository.sizes:
        from huggingface_hub import metadata_load

        (readme,) = repository.fetch(["README.md"])
        try:
            card = metadata_load(readme) or {}
        except Exception as error:  # of YAML, of UTF-8
            raise UserError(f"the head of README.md of {name!r} cannot be read: {first_line(error):.200}") from None
    paths = select(list(repository.sizes), card.get("configs"), subset, split, name)
    return Shards(repository.fetch(paths), repository.commit)


def select(paths: Sequence[str], configs: Any, subset: str, split: str, name: str) -> list[str]:
    """Of a data set's paths those of a subset's split, in order. `configs`, of the head of its README.md, say what is
    where; without them the paths do. UserError."""
    rows = _rows(paths, name)
    subsets, default = _of_card(configs, rows) if configs else (_by_names(rows), "")
    if not subset:
        first = default or ("default" if "default" in subsets else "")
        if len(subsets) > 1 and not first:
            raise UserError(f"the data set {name!r} has several subsets; set data.subset to one of {_some(subsets)}")
        subset = first or next(iter(subsets))
    if subset not in subsets:
        raise UserError(f"the data set {name!r} has no subset {subset!r}{nearest(subset, subsets)}")
    splits = subsets[subset]
    if split not in splits:
        raise UserError(f"the subset {subset!r} of {name!r} has no split {split!r}{nearest(split, splits)}")
    if not splits[split]:
        raise UserError(
            f"README.md of {name!r} names files for the split {split!r} of {subset!r} of which none is there as "
            f"parquet or JSONL; there are {_some(paths)}"
        )
    return splits[split]


def _rows(paths: Sequence[str], name: str) -> list[str]:
    """Those of one format, in the order of the numbers in them."""
    for ending in (".parquet", ".jsonl"):
        if rows := [path for path in paths if path.endswith(ending)]:
            return sorted(rows, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)])
    scripts = [path for path in paths if path.endswith(".py")]
    if scripts:
        raise UserError(
            f"the data set {name!r} has a loading script, {scripts[0]}, which is not run, and no parquet or JSONL; "
            "data.revision=refs/convert/parquet has its rows, if the hub has converted them"
        )
    raise UserError(f"the data set {name!r} has no parquet and no JSONL; it has {_some(paths)}")


def _by_names(rows: Iterable[str]) -> Subsets:
    """By what paths are called: data/SPLIT-00000-of-00002, SUBSET/SPLIT-..., SUBSET/SPLIT/0000, SPLIT. Where no file of
    a subset names a split, they are all `train`."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in rows:
        *folders, file = path.split("/")
        stem, split = file.rpartition(".")[0], ""
        if match := _SHARD.fullmatch(stem):
            split = match["split"]
        elif folders and (folders[-1] in SPLITS or (stem.isdigit() and len(folders) > 1)):
            split = folders[-1]
        elif words := _WORD.findall(stem.lower()):
            split = words[-1]
        if folders and split == folders[-1]:
            folders.pop()
        if folders[:1] == ["data"]:
            folders.pop(0)
        found.setdefault("/".join(folders) or "default", {}).setdefault(split, []).append(path)
    for splits in found.values():
        unnamed = splits.pop("", [])
        if not splits:
            splits["train"] = unnamed
    return found


def _of_card(configs: Any, rows: Sequence[str]) -> tuple[Subsets, str]:
    """What README.md says, and the default subset. An entry without files has those of its folder, by their names."""
    found: Subsets = {}
    default = ""
    for entry in configs if isinstance(configs, list) else []:
        if not isinstance(entry, dict):
            continue
        subset, files = str(entry.get("config_name", "default")), entry.get("data_files")
        folder = str(entry.get("data_dir") or "").removeprefix("./").rstrip("/")
        folder = f"{folder}/" if folder else ""
        inside = {path.removeprefix(folder): path for path in rows if path.startswith(folder)}
        if files is None:
            names = _by_names(inside)
            chosen = names.get("default") or next(iter(names.values()), {})
            found[subset] = {split: [inside[path] for path in paths] for split, paths in chosen.items()}
        else:
            patterns = _patterns(files)
            found[subset] = {
                split: [inside[path] for path in inside if any(_matches(path, pattern) for pattern in of_split)]
                for split, of_split in patterns.items()
            }
        default = subset if entry.get("default") is True else default
    return (found, default) if found else (_by_names(rows), "")


def _patterns(files: Any) -> dict[str, list[str]]:
    """By split, from `data_files` as data sets write them: a pattern, several, {split, path}s, or {split: patterns}."""
    if isinstance(files, Mapping):
        pairs = list(files.items())
    else:
        items = files if isinstance(files, list) else [files]
        pairs = [(i.get("split", "train"), i.get("path")) if isinstance(i, Mapping) else ("train", i) for i in items]
    found: dict[str, list[str]] = {}
    for split, path in pairs:
        found.setdefault(str(split), []).extend(str(p) for p in (path if isinstance(path, list) else [path]))
    return found


def _matches(path: str, pattern: str) -> bool:
    """As in a shell: * stays inside a folder, ** does not, and may be none."""
    pattern = pattern.removeprefix("./")
    if "**" in pattern:
        return fnmatchcase(path, pattern) or fnmatchcase(path, pattern.replace("**/", ""))
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def _some(names: Iterable[str], most: int = 8) -> str:
    """Names for a sentence."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(map(shown, names[:most])) or "no files") + more


@dataclass(frozen=True)
class _Repository:
    """One commit of a repository: the sizes of its files in bytes, by path."""

    kind: str
    name: str
    commit: str
    sizes: Mapping[str, int]

    def fetch(self, paths: Sequence[str]) -> list[Path]:
        """The paths in the cache; what is not there is fetched. UserError, also for a file of another size than on the
        hub."""
        lacking = [path for path in paths if self._cached(path) is None]
        if lacking:
            from huggingface_hub import snapshot_download

            with _told(self.kind, self.name, self.commit):
                patterns = [glob.escape(path) for path in lacking]
                snapshot_download(self.name, repo_type=self.kind, revision=self.commit, allow_patterns=patterns)
        files = []
        for path in paths:
            file = self._cached(path)
            if file is None:
                raise UserError(f"the {_KINDS[self.kind]} {self.name!r} on the hub has no {path}")
            if (size := file.stat().st_size) != self.sizes[path]:
                raise UserError(
                    f"{file} has {size:,} bytes, and on the hub {self.sizes[path]:,}: delete it; it is fetched again"
                )
            files.append(file)
        return files

    def _cached(self, path: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(self.name, path, repo_type=self.kind, revision=self.commit)
        return Path(file) if isinstance(file, str) and os.path.isfile(file) else None


def _open(kind: str, name: str, revision: str) -> _Repository:
    """UserError where it cannot be listed."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    commit = commit_of(kind, name, revision)
    with _told(kind, name, revision):
        try:
            entries: list[Any] = list(get_cached_repo_tree(name, repo_type=kind, revision=commit))
        except CachedRepoTreeNotFoundError:
            entries = list(HfApi().list_repo_tree(name, repo_type=kind, revision=commit, recursive=True))
    return _Repository(kind, name, commit, {e.path: e.size for e in entries if isinstance(e, RepoFile)})


@contextlib.contextmanager
def _told(kind: str, name: str, revision: str) -> Iterator[None]:
    """Errors of the client, and of what it stands on, become a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_sentence(error, f"the {_KINDS[kind]} {name!r}", name, revision)) from error


def _sentence(error: Exception, what: str, name: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its terms on {hub}, and set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} on the hub has no revision {revision or 'main'!r}: give a branch, a tag or a whole commit"
    if status == 401 and "Invalid credentials" in str(error):
        return f"{hub} does not know the token that {what} was asked for with: set HF_TOKEN to another, or unset it"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{hub} shows no {what.removeprefix('the ')}: the name may be wrong, or it is private, and HF_TOKEN must "
            "be a token that may read it"
        )
    if "Consistency check failed" in str(error):
        return f"{what} was not fetched whole ({first_line(error):.200}): start again, and what is whole is kept"
    if status is not None:
        return f"{hub} answers with status {status} for {what}: {first_line(error):.200}"
    if constants.is_offline_mode():
        return f"not all of {what} is in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
    reason: BaseException = error
    while reason.__cause__ or reason.__context__:
        reason = reason.__cause__ or reason.__context__ or reason
    if isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError) or _is_of_network(error):
        return (
            f"{hub} cannot be reached ({first_line(reason):.120}), and not all of {what} is in the cache, "
            f"{constants.HF_HUB_CACHE}"
        )
    return f"{what} cannot be fetched: {first_line(error):.200}"


def _is_of_network(error: BaseException) -> bool:
    """Of the HTTP library under the client, httpx or httpx2."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
