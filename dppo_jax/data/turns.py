"""Between two turns of the policy: an environment's text as tokens, in the chat template's form; turns back to text."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dppo_jax.data.chat import DATE, ChatRenderer
from dppo_jax.data.prompts import check_tokens, token_ids
from dppo_jax.errors import UserError

TURN, TEXT = "Turn0f7a31", "Text5b92c4"  # stand where a turn of the policy, and an environment's text, would stand


class TurnEncoder:
    """What follows a turn of the policy: its end, the environment's turn, and the opening of the next turn.

    With `chat` that is what the chat template writes behind a turn, of a conversation that is rendered around the text;
    without it, the text as it is. The turn itself is never rendered. Close it, or use it in a `with`.
    Raises: UserError, here for a template that cannot do so, and in a call for a text that has no such tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool,
        eos_ids: Sequence[int],
        chat_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
    ):
        self._tokenizer, self._ends = tokenizer, frozenset(eos_ids)
        self._render = ChatRenderer(tokenizer, date=date, arguments=chat_kwargs) if chat else None
        self._encoded = functools.lru_cache(maxsize=4096)(self._encode)
        self.has_tools = False  # whether the template knows turns of tools; else they are the user's
        if self._render:
            try:
                if TEXT not in self._following(TEXT, "user"):
                    raise UserError("the tokenizer's chat template leaves out what follows a turn of the assistant")
                self.has_tools = self._has_tools()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Ends the process that renders."""
        if self._render:
            self._render.close()

    def __enter__(self) -> "TurnEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, text: str, role: str = "user", *, after: int) -> list[int]:
        """The ids that follow a turn whose last token is `after`, which is not written twice where it ends the turn."""
        ids = self._encoded(text, role if self.has_tools else "user")
        if self._render and after in self._ends and ids[:1] == [after]:
            return ids[1:]
        return list(ids)

    def _encode(self, text: str, role: str) -> list[int]:
        if self._render:
            text = self._following(text, role)
        ids = token_ids(self._tokenizer, text, add_special_tokens=False) if text else []
        check_tokens(self._tokenizer, text, ids)
        return ids

    def _following(self, text: str, role: str) -> str:
        assert self._render is not None
        asked = {"role": "user", "content": TEXT}
        whole = self._render([asked, {"role": "assistant", "content": TURN}, {"role": role, "content": text}])
        _, found, following = whole.partition(TURN)
        if not found:
            raise UserError("the tokenizer's chat template leaves out the assistant's turn, which a conversation needs")
        return following

    def _has_tools(self) -> bool:
        try:
            return TEXT in self._following(TEXT, "tool")
        except UserError:
            return False


def turns_of(
    tokenizer: Any, tokens: np.ndarray, turn: np.ndarray, *, turns: int, eos_ids: Sequence[int]
) -> tuple[str, ...]:
    """The text of every turn of a row: tokens i[R], and i[R] the turn in which each was drawn, from 1. A turn's last
    token is dropped where it ends the turn, and every other token kept, special ones too."""
    texts = []
    for number in range(1, turns + 1):
        ids = tokens[turn == number].tolist()
        if ids and ids[-1] in eos_ids:
            ids.pop()
        texts.append(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return tuple(texts)
