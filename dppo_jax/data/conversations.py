"""What a reward model reads: prompts with replies, by its own tokenizer and chat template."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from dppo_jax.data.chat import DATE, ChatRenderer
from dppo_jax.data.examples import Example
from dppo_jax.data.prompts import conversation, token_ids
from dppo_jax.errors import UserError

WHOSE = "the reward model"  # how sentences here begin


class Conversations:
    """Prompts with replies to token ids. A chat template writes its own special tokens; none are added. Use it in a
    `with`, or close it.

    template: text around "{prompt}", as the policy was given it. date: as in `ChatRenderer`.
    Raises: UserError, here where the tokenizer has no chat template, and in a call where that fails.
    """

    def __init__(self, tokenizer: Any, *, template: str = "{prompt}", date: str = DATE):
        if not tokenizer.chat_template:
            raise UserError(f"{WHOSE}'s tokenizer has no chat template, which is how it reads a prompt and its reply")
        self._tokenizer, self._template = tokenizer, template
        self._render = ChatRenderer(tokenizer, date=date, replied=True)

    def close(self) -> None:
        """Ends the process that renders."""
        self._render.close()

    def __enter__(self) -> "Conversations":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, prompt: str | Sequence[dict[str, str]], reply: str) -> list[int]:
        """The ids of one conversation, closed by what the template writes after a reply."""
        return token_ids(self._tokenizer, self._text(prompt, reply), "conversation", add_special_tokens=False)

    def check(self, examples: Iterable[Example]) -> None:
        """UserError for a conversation that the template refuses or leaves the reply out of. Templates look at roles:
        of the examples with the same ones the first is tried."""
        tried: dict[str, Example] = {}
        for example in examples:
            roles = "" if isinstance(example.prompt, str) else json.dumps([m["role"] for m in example.prompt])
            tried.setdefault(roles, example)
        for example in tried.values():
            try:
                one, other = (self(example.prompt, reply) for reply in ("Yes.", "No."))
            except UserError as error:
                raise UserError(f"{f'{example.where}: ' if example.where else ''}{error}") from None
            if one == other:
                raise UserError(f"{WHOSE}'s chat template leaves the reply out: every one would have the same score")

    def _text(self, prompt: str | Sequence[dict[str, str]], reply: str) -> str:
        messages = [*conversation(prompt, self._template), {"role": "assistant", "content": reply}]
        try:
            return self._render(messages)
        except UserError as error:
            raise UserError(f"{WHOSE}: {error}") from None
