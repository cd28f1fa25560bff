"""Where a run writes, and what makes it the run it is."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dppo_jax.data.prompts import PromptStream
from dppo_jax.files import Path
from experiments.run.evaluation import Evaluation
from experiments.run.identity import Identity, identity, same_everywhere
from experiments.run.remarks import remarks
from experiments.run.setup import Setup


class RunFolder(NamedTuple):
    """Where one run writes, what makes it the run it is, and what is to be said and logged at its first step."""

    path: Path
    identity: Identity
    remarks: Sequence[str] = ()
    counts: Mapping[str, float] = {}

    def name(self, workdir: Path) -> str:
        """Of a run in the checkpoints of this workdir; "." for a single one."""
        return str(self.path.relative_to(workdir))


def run_folder(path: Path, setup: Setup, stream: PromptStream, evaluation: Evaluation) -> RunFolder:
    """Of a run on these prompts. UserError where another host has other weights or data: all hosts must call this."""
    own = identity(setup, {"data": stream, **evaluation.streams})
    same_everywhere(own)
    of_data = [f"data: {remark}" for remark in stream.remarks]
    counts = {f"data/{kind}": float(count) for kind, count in stream.counts.items()}
    said = [*remarks(setup.config), *of_data, *evaluation.remarks]
    return RunFolder(path, own, said, counts | evaluation.counts)
