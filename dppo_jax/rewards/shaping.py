"""The terms of a reward: TERMS[name](responses, settings) -> f32[b], summed with the weights of reward.terms.

Computed on the host for the responses it scored. No jax here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex

from dppo_jax.errors import UserError, first_line, lookup


class Responses(NamedTuple):
    """What terms are computed from."""

    replies: Sequence[str]
    lengths: np.ndarray  # i[b], tokens
    scores: np.ndarray  # f32[b], of the verifier or the function of one's own
    model_scores: np.ndarray | None = None  # f32[b], of the reward model; None without one


@dataclass(frozen=True)
class Settings:
    """What the terms beside `correct` ask for."""

    limit: int  # tokens of a response, at most
    buffer: int = 0  # of `length`
    format: str = ""  # of `format`: a regular expression, in which . is a line's end too
    ngram: int = 3  # of `repetition`, words
    time_limit_s: float = 10.0  # of `format`, for one reply


def correct(responses: Responses, settings: Settings) -> np.ndarray:
    """The score of the verifier, or of the function of one's own."""
    return responses.scores


def has_format(responses: Responses, settings: Settings) -> np.ndarray:
    """1 where the whole reply matches, else 0; NaN where that took more than the time limit."""
    pattern = compiled(settings.format)

    def matches(reply: str) -> float:
        try:
            return float(pattern.fullmatch(reply, timeout=settings.time_limit_s) is not None)
        except (TimeoutError, MemoryError):
            return np.nan

    return np.array([matches(reply) for reply in responses.replies], np.float32)


def length(responses: Responses, settings: Settings) -> np.ndarray:
    """`overlong_penalty`."""
    return overlong_penalty(responses.lengths, limit=settings.limit, buffer=settings.buffer)


def repetition(responses: Responses, settings: Settings) -> np.ndarray:
    """Minus the share of repeated n-grams of words: different ones / all of them - 1, and 0 of fewer than n words, as
    the repetition penalty of Open-R1 has it (huggingface/open-r1, rewards.py, after 2502.03373), whose
    repetition_max_penalty is minus the weight here."""
    return np.array([-repeated_share(reply, settings.ngram) for reply in responses.replies], np.float32)


def model(responses: Responses, settings: Settings) -> np.ndarray:
    """The score of the reward model, which the devices computed. UserError where there is none."""
    if responses.model_scores is None:
        raise UserError("reward.terms.model is of training, where a reward model is; set it to 0.0 here")
    return responses.model_scores


TERMS: dict[str, Callable[[Responses, Settings], np.ndarray]] = {
    "correct": correct,
    "format": has_format,
    "length": length,
    "repetition": repetition,
    "model": model,
}


def values(
    responses: Responses, weights: Mapping[str, float], settings: Settings
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(by term with a weight, f32[b], counts). A format that took too long is a 0, counted as "format_stopped"."""
    found = {name: lookup(TERMS, name, "term in reward.terms")(responses, settings) for name in weights}
    if "format" not in found:
        return found, {}
    stopped = np.isnan(found["format"])
    return found | {"format": np.where(stopped, np.float32(0), found["format"])}, {"format_stopped": int(stopped.sum())}


def total(terms: Mapping[str, np.ndarray], weights: Mapping[str, float], rows: int) -> np.ndarray:
    """The weighted sum of terms, f32[rows]."""
    reward: np.ndarray = np.zeros(rows, np.float32)
    for name, term in terms.items():
        reward = reward + np.float32(weights[name]) * term
    return reward


def active(weights: Mapping[str, float], *, buffer: int) -> dict[str, float]:
    """The weights that count, `correct` first: not 0, and of `length` only where there is a buffer."""
    order = sorted(weights, key=lambda name: (name != "correct", name))
    return {name: weights[name] for name in order if weights[name] and (name != "length" or buffer)}


def compiled(pattern: str) -> "regex.Pattern[str]":
    """reward.format; UserError where it is no regular expression."""
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"reward.format is no regular expression: {first_line(error):.200}") from None


def repeated_share(text: str, ngram: int) -> float:
    """Of the text's n-grams of words, in lower case, those that stood there before; 0 of fewer than n words."""
    words = text.lower().split()
    count = len(words) - ngram + 1
    if count < 1:
        return 0.0
    return 1.0 - len(set(zip(*(words[start:] for start in range(ngram)), strict=False))) / count


def overlong_penalty(lengths: np.ndarray, *, limit: int, buffer: int) -> np.ndarray:
    """0 up to limit - buffer tokens, then down linearly to -1 at `limit`: f32[B] of i[B] (DAPO, 2503.14476, eq. 13).

    `buffer` 0: no penalty.
    """
    if buffer == 0:
        return np.zeros(len(lengths), np.float32)
    return np.clip((limit - buffer - np.asarray(lengths)) / buffer, -1.0, 0.0).astype(np.float32)
