"""What a critic may see and the policy may not: the answer, or a column of the row, in a prompt of the critic's own."""

import re
from dataclasses import dataclass

from dppo_jax.data.examples import Example
from dppo_jax.data.shapes import find
from dppo_jax.errors import UserError, nearest

ANSWER = "answer"  # in a column's place: the label, as the verifier has it
PLACES = ("{prompt}", "{privileged}")


def check_template(template: str) -> None:
    """UserError where it lacks a place for the prompt or for what the critic alone sees."""
    for place in PLACES:
        if place not in template:
            raise UserError(f"critic.template must hold {place!r}, but is {template!r:.200}")


@dataclass(frozen=True)
class Privileged:
    """The critic's own prompts (BPCO, 2608.23566).

    column: of the row; a.b is b of a; ANSWER: the first label. template: the text around "{prompt}" and "{privileged}",
    applied to a text prompt or to the last user message, within data.template. max_prompt_len: tokens, all included.
    """

    column: str
    template: str
    max_prompt_len: int

    def prompt(self, example: Example) -> str | tuple[dict[str, str], ...]:
        """What the critic reads in the place of the example's prompt. UserError where the row has nothing to add."""
        told = {"{privileged}": self._told(example)}

        def around(prompt: str) -> str:
            told["{prompt}"] = prompt
            return re.sub("|".join(map(re.escape, PLACES)), lambda place: told[place[0]], self.template)

        if isinstance(example.prompt, str):
            return around(example.prompt)
        messages = [dict(message) for message in example.prompt]
        of_user = [message for message in messages if message["role"] == "user"]
        if not of_user:
            raise UserError("the prompt has no message of a user's, around which critic.template could stand")
        of_user[-1]["content"] = around(of_user[-1]["content"])
        return tuple(messages)

    def _told(self, example: Example) -> str:
        if self.column == ANSWER:
            if not example.answer:
                raise UserError(f"critic.privileged = {ANSWER!r}, but the row has no answer")
            return example.answer
        value = find(example.meta, self.column)
        if value is None:
            near = nearest(self.column, [*example.meta, ANSWER])
            raise UserError(f"has no column {self.column!r:.80} beside prompt and answer, for critic.privileged{near}")
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise UserError(f"{self.column!r:.80} must be text or a number for critic.privileged, not {value!r:.60}")
        return getattr(value, "text", None) or str(value)  # a number as it is written
