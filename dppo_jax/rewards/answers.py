"""Tasks whose replies a verifier scores on the answer. Reward workers import this, so no jax here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dppo_jax.data.examples import UNSCORED, Example, Task
from dppo_jax.rewards.verifiers import VERIFIERS


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
