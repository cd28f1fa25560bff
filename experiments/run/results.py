"""The results file of an evaluation: whether it is of this config, policy and data, and which batches it lacks."""

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Any

import numpy as np

from configs import base
from dppo_jax.data.examples import Example
from dppo_jax.data.prompts import PromptStream
from dppo_jax.devices import hosts
from dppo_jax.errors import UserError
from dppo_jax.evaluate import OUTCOMES, Samples
from dppo_jax.files import Path, is_file
from dppo_jax.rewards.votes import vote
from dppo_jax.storage.checkpoint import agree
from dppo_jax.storage.lock import locked
from dppo_jax.storage.results import ResultsFile
from dppo_jax.storage.run_config import NAME, flatten, write_config
from experiments.run.identity import PLACES, identity, same_everywhere
from experiments.run.policy import Policy
from experiments.run.ranges import shown

# What an evaluation's samples are a function of, beside the policy and the data (dotted names, * for any).
DECIDING = (
    "seed", "policy.matmul", "policy.head_float32", "policy.attention", "lora.*", "rollout.dtype", "eval.*",
    "rollout.max_new_tokens", "reward.time_limit_s",
)  # fmt: skip
PACKAGES = ("jax", "numpy", "transformers", "tokenizers", "math-verify", "reasoning-gym")


def about(policy: Policy, streams: Mapping[str, PromptStream]) -> dict[str, Any]:
    """What an evaluation's samples are a function of, and the versions that drew them. UserError where another host
    has other weights or data: all hosts must call this."""
    own = identity(policy.setup, streams)
    same_everywhere(own)
    versions = {package: version(package) for package in PACKAGES}
    found = {"config": own.config, "policy": policy.about(own.weights), "model": own.model, "prompts": own.prompts}
    return found | {"versions": versions}


def compare(stored: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> list[str]:
    """Sentences on what differs and may. UserError, one sentence, where the file is of other samples."""
    try:
        before, after = flatten(stored["config"]), flatten(now["config"])
        policies, prompts = (stored["policy"], now["policy"]), (stored["prompts"], now["prompts"])
        model, versions = stored["model"], stored["versions"]
    except (KeyError, AttributeError):
        raise UserError(f"{path} is there and is no file of this command: name another") from None
    sets = [", ".join(sorted(section.removeprefix("eval.sets.") for section in side)) for side in prompts]
    if sets[0] != sets[1]:
        raise UserError(f"{path} is of another config: eval.sets was {sets[0]} and is now {sets[1]}; {_MEND}")
    for key in sorted({*before, *after}):
        if _decides(key, after) and before.get(key, _default(key)) != after.get(key, _default(key)):
            was, is_now = (shown(flat[key]) if key in flat else "absent" for flat in (before, after))
            raise UserError(f"{path} is of another config: {key} was {was} and is now {is_now}; {_MEND}")
    if policies[0]["fingerprint"] != policies[1]["fingerprint"]:
        was, is_now = (" at ".join(filter(None, (p["path"], p.get("checkpoint"), p["commit"]))) for p in policies)
        other = "other weights" if was == is_now else f"{was}, and this is {is_now}"
        raise UserError(f"{path} is of another policy: {other}; {_MEND}")
    if model != now["model"]:
        raise UserError(f"{path} is of another model: its config.json or tokenizer was another; {_MEND}")
    for section in prompts[1]:
        if prompts[0].get(section) != prompts[1][section]:
            raise UserError(f"{path} is of other data: the prompts or answers of {section} were others; {_MEND}")
    newer = {name: new for name, new in now["versions"].items() if new != versions.get(name)}
    changes = [f"{name} {versions.get(name)} -> {new}" for name, new in newer.items()]
    return [f"{path} was begun with other versions: {', '.join(changes)}"] if changes else []


_MEND = "put that back, or name another file"


def _decides(key: str, config: Mapping[str, Any]) -> bool:
    if key == "eval.every" or (key == "rollout.max_new_tokens" and config.get("eval.max_new_tokens") is not None):
        return False
    return any(fnmatchcase(key, pattern) for pattern in DECIDING) and not any(
        fnmatchcase(key, pattern) for pattern in PLACES
    )


def _default(key: str) -> Any:
    """Of a key that one side lacks, which then is of an earlier version."""
    general = f"data.{key.split('.', 3)[-1]}" if key.startswith("eval.sets.") else key
    return flatten(base.get_config().to_dict()).get(general)


def begun(path: Path | None) -> Path | None:
    """The folder that has the config, with commits, of an evaluation that is to go on; None where there is none.
    UserError for a file that is no .parquet."""
    if path is None:
        return None
    if path.suffix != ".parquet":
        raise UserError(f"--results {path}: the file's name must end in .parquet")
    parts = ResultsFile(path).parts
    return parts if is_file(parts / NAME) else None


class Results:
    """FILE.parquet of an evaluation. All hosts make it and call the same methods; the writer alone reads and writes."""

    def __init__(self, path: Path, about: Mapping[str, Any], stack: ExitStack):
        """Begins the file, or goes on with it; held until `stack` closes. UserError as of `compare`."""
        self._file, self._about = ResultsFile(path), about
        self._names: list[str] = []
        for sentence in agree(lambda: self._begin(stack)):
            if hosts.is_writer():
                print(sentence, file=sys.stderr)

    def _begin(self, stack: ExitStack) -> list[str]:
        stored = self._file.about()
        notes = compare(stored, self._about, self._file.path) if stored is not None else []
        if self._file.whole:
            return [*notes, f"{self._file.path} has all samples: nothing is drawn"]
        if stored is None:
            self._file.begin(self._about)
            write_config(self._file.parts, self._about["config"])  # commits, for `load_setup`
        stack.enter_context(locked(self._file.parts))
        return notes

    def of_set(self, name: str, stream: PromptStream, *, num_prompts: int, samples: int) -> "SetResults":
        """The part of one evaluation set."""
        self._names.append(name)
        return SetResults(self._file, name, stream, num_prompts, samples)

    def finish(self) -> None:
        """Makes the file of all batches, once they are there."""
        if hosts.is_writer() and not self._file.whole:
            self._file.finish(self._about, self._names)


class SetResults:
    """Of one evaluation set: an `evaluate.Book`."""

    def __init__(self, file: ResultsFile, name: str, stream: PromptStream, num_prompts: int, samples: int):
        self._file, self._name, self._stream = file, name, stream
        self._num_prompts, self._samples = num_prompts, samples

    def known(self) -> dict[int, Samples]:
        """The batches that are there, on every host."""

        def find() -> list[list[Any]]:
            tables = self._file.batches(self._name, self._num_prompts * self._samples)
            columns = ("reward", "length", "truncated", "outcome", "extracted")
            return [[number, *(table[column].to_pylist() for column in columns)] for number, table in tables.items()]

        found = {}
        for number, rewards, lengths, truncated, outcomes, extracted in agree(find):
            votes = np.array([vote(answer or "") for answer in extracted], np.int64).view(np.int32).reshape(-1, 2)
            found[number] = Samples(
                np.array(rewards, np.float32),
                np.array(lengths, np.int32),
                np.array(truncated, bool),
                np.array([OUTCOMES.index(outcome) for outcome in outcomes], np.int32),
                votes,
            )
        batches = -(-len(self._stream) // self._num_prompts)
        if found and not self._file.whole and hosts.is_writer():
            sentence = f"eval.sets.{self._name}: {len(found)} of {batches} batches are in {self._file.parts}"
            print(f"{sentence}, and are not drawn again", file=sys.stderr)
        return found

    def keep(self, number: int, samples: Samples, replies: list[str], answers: list[str]) -> None:
        """Writes a batch, on the writer."""
        if not hosts.is_writer():
            return
        first, rows = number * self._num_prompts, np.arange(len(replies))
        examples = [self._stream.examples[first + row // self._samples] for row in rows.tolist()]
        columns: dict[str, Any] = {
            "set": [self._name] * len(rows),
            "question": first + rows // self._samples,
            "sample": rows % self._samples,
            "prompt": [_text(example) for example in examples],
            "answers": [list(example.labels) for example in examples],
            "reply": replies,
            "extracted": [answer or None for answer in answers],
            "reward": samples.rewards,
            "length": samples.lengths,
            "truncated": samples.truncated,
            "outcome": [OUTCOMES[outcome] for outcome in samples.outcomes],
        }
        self._file.add(self._name, number, columns)


def _text(example: Example) -> str:
    """The prompt; messages as JSON."""
    return example.prompt if isinstance(example.prompt, str) else json.dumps(example.prompt, ensure_ascii=False)
