"""Examples, and tasks: examples with what scores a reply. Reward workers import this, so no jax here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

UNSCORED = "none"  # in a verifier's place: replies have no score but a reward's other terms, and rows need no answer

# Kinds of what is left out, as the log counts them, and what they are called in a sentence.
LEFT_OUT = {
    "blank": "blank lines",
    "beyond_size": "rows beyond data.size",
    "bad_label": "rows with a label that the verifier could never accept",
    "skipped": "prompts of more than data.max_prompt_len tokens",
}


@dataclass(frozen=True)
class Example:
    """One question. The prompt is text, or a tuple of {"role", "content"} messages."""

    prompt: str | tuple[dict[str, str], ...]
    answer: str  # "" where only the data set's own scorer knows what is right, or nothing does
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # file and row, for sentences
    also: tuple[str, ...] = ()  # further answers, each as right as `answer`
    verifier: str = ""  # a key of rewards.verifiers.VERIFIERS, where it is not the task's

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers that are right."""
        return self.answer, *self.also


class Verify(Protocol):
    """Scores a reply, 0.0 to 1.0. Must be picklable where the task is isolated."""

    def __call__(self, reply: str, example: Example) -> float: ...


@dataclass(frozen=True)
class Task:
    """Examples and the verifier of their replies.

    `isolated` tasks are scored in worker processes: their verifier may hang or eat memory on what a model writes.
    `left_out` counts what a file holds and the task does not, by kind: see `LEFT_OUT`. `duplicates` counts examples
    whose prompt and answer an earlier one has too. `remarks` are further things that a run says when it begins.
    """

    name: str
    examples: Sequence[Example]
    verify: Verify
    isolated: bool
    worker_imports: tuple[str, ...] = ()  # modules that a worker loads before its first time limit starts
    left_out: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    remarks: tuple[str, ...] = ()

    def score(self, reply: str, example: Example) -> float:
        """Scores in this process, without a limit; training scores through `rewards.scorer.Scorer`."""
        return self.verify(reply, example)
