"""Examples, tasks and how a task scores a reply. Reward workers import this, so no jax here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dppo_jax.rewards.verifiers import VERIFIERS

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
    verifier: str = ""  # a key of VERIFIERS, where it is not the task's

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


@dataclass(frozen=True)
class AnswerVerifier:
    """A row of VERIFIERS, unless the example names another, on its answer; of several the first by which the reply is
    right."""

    name: str

    def __call__(self, reply: str, example: Example) -> float:
        verify = VERIFIERS[example.verifier or self.name]
        score = verify(reply, example.answer)
        for label in example.also:
            if score == 1.0:
                break
            score = max(score, verify(reply, label))
        return score


def no_score(reply: str, example: Example) -> float:
    """0.0, whatever it says."""
    return 0.0


def answer_task(
    name: str, examples: Sequence[Example], verifier: str, left_out: Mapping[str, int] | None = None
) -> Task:
    """Examples whose replies a row of VERIFIERS scores, or UNSCORED. `left_out` as in Task."""
    if verifier == UNSCORED:
        return Task(name, examples, no_score, False, (), left_out or {})
    isolated = "math_verify" in {verifier, *(example.verifier for example in examples)}
    imports = ("math_verify", "dppo_jax.rewards.warm") if isolated else ()
    return Task(name, examples, AnswerVerifier(verifier), isolated, imports, left_out or {})
