"""What a run will have on its disk, told before its first step, and whether there is room for it."""

import math
import shutil
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dppo_jax.files import Path, files_in, is_bucket, size_of
from dppo_jax.metrics import PROB_DIFF_EDGES, RATIO_EDGES

SCALARS = 6000  # bytes of a step's scalars, in tb/ and scalars.jsonl together: about 80 tags
BIN = 16  # bytes of a histogram's bin
TOKEN = 4  # bytes of a token's text, about
WRITTEN = ("checkpoints", "tb", "samples", "scalars.jsonl", "policy", "adapter")  # what counts, of a run's folder


def tree_bytes(tree: Any) -> int:
    """Of the arrays that a tree of shapes stands for."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sentences(c: ConfigDict, workdir: Path, folders: list[Path], state: int, policy: int) -> Iterator[str]:
    """For stderr: what will be there at most, and a warning where the disk has less room than what is still missing.

    state, policy: bytes of a checkpoint and of all parameters of the policy; folders: of the runs in the workdir.
    """
    count, steps = most_checkpoints(c), c.steps * len(folders)
    growth = log_bytes(c)
    export = policy if c.checkpoint.export else 0
    whole = count * state + growth * steps + export
    model = f", a model of {size(export)}" if export else ""
    logs = f"about {size(1000 * growth)} of logs and samples per 1,000 steps"
    steps_kept = f"at most {count:,} checkpoint{'s' * (count > 1)} of {size(state)}"
    said = f"disk: {steps_kept}{model}, {logs}; {size(whole)} in all"
    if is_bucket(workdir):
        yield said
        return
    free, there = shutil.disk_usage(workdir).free, sum(_bytes_in(at) for at in {workdir, *folders})
    yield f"{said}, and {size(free)} are free"
    if whole - there > free:
        periods = {"checkpoint.keep_every": c.checkpoint.keep_every, "log.samples": c.log.samples}
        longer = " or ".join(key for key, every in periods.items() if every)
        yield (
            f"warning: the run may need {size(whole - there)} more on the disk of {workdir}, which has {size(free)}: "
            f"lower checkpoint.keep, {longer and f'raise {longer}, '}or take another --workdir"
        )


def most_checkpoints(c: ConfigDict) -> int:
    """That are there at one time: the newest, the one that is being written, and what else is kept."""
    k = c.checkpoint
    others = (c.steps // k.keep_every if k.keep_every else 0) + bool(k.best)
    ever = math.inf if k.every_s else math.ceil(c.steps / k.every) if k.every else 1
    return int(min(k.keep + 1 + others, ever))


def log_bytes(c: ConfigDict) -> float:
    """A step of one run adds to its logs and samples, about; with replies as long as they may be."""
    histograms = (len(RATIO_EDGES) + len(PROB_DIFF_EDGES)) * BIN
    tokens = c.log.transcripts * (c.data.max_prompt_len + c.rollout.max_new_tokens)
    samples = 2 * tokens * TOKEN  # in samples/ and in tb/
    due = ((histograms, c.log.histograms), (samples, c.log.samples))
    return SCALARS + sum(count / every for count, every in due if every)


def size(count: float) -> str:
    """Bytes, for people."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def _bytes_in(folder: Path) -> int:
    """Of what counts that is there already."""
    found = [folder / name for name in WRITTEN]
    return sum(size_of(file) for at in found if at.exists() for file in (files_in(at) if at.is_dir() else [at]))
