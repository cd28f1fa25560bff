"""Examples, tasks and how a task scores a reply. Reward workers import this, so no jax here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dppo_jax.rewards.verifiers import VERIFIERS


@dataclass(frozen=True)
class Example:
    """One question. The prompt is text, or a tuple of {"role", "content"} messages."""

    prompt: str | tuple[dict[str, str], ...]
    answer: str  # "" where only the data set's own scorer knows what is right
    meta: dict[str, Any] = field(default_factory=dict)


class Verify(Protocol):
    """Scores a reply, 0.0 to 1.0. Must be picklable where the task is isolated."""

    def __call__(self, reply: str, example: Example) -> float: ...


@dataclass(frozen=True)
class Task:
    """Examples and the verifier of their replies.

    `isolated` tasks are scored in worker processes: their verifier may hang or eat memory on what a model writes.
    """

    name: str
    examples: Sequence[Example]
    verify: Verify
    isolated: bool
    worker_imports: tuple[str, ...] = ()  # modules that a worker loads before its first time limit starts

    def score(self, reply: str, example: Example) -> float:
        """Scores in this process, without a limit; training scores through `rewards.scorer.Scorer`."""
        return self.verify(reply, example)


@dataclass(frozen=True)
class AnswerVerifier:
    """A row of VERIFIERS, on the example's answer."""

    name: str

    def __call__(self, reply: str, example: Example) -> float:
        return VERIFIERS[self.name](reply, example.answer)


def answer_task(name: str, examples: Sequence[Example], verifier: str) -> Task:
    if verifier == "math_verify":
        return Task(name, examples, AnswerVerifier(verifier), isolated=True, worker_imports=("math_verify",))
    return Task(name, examples, AnswerVerifier(verifier), isolated=False)
