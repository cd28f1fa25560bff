"""The task of the reuse regime: ten additions and multiplications mod 13, with several spellings of every state.

A prompt is a start state and ten operations, a reply the state after each of them, 11 and 10 tokens:

    f7 *three +twelve ... -> c8 a7 ...

The letter of a state says nothing, its number is the state: f7 *three is 21 = 8, and a8 to h8 all say so. The reward
is 1 where the last state of the reply is the final one (the verifier `last_number`); the states before it do not
count. Operations are spelled without digits, so that no verifier takes one for a state.

Tokens: 0 ends a reply and pads, 1 + 8 r + s is state r in spelling s (of 8), then +zero to +twelve and *zero to
*twelve. With more spellings and a `tail`, most tokens are rare, as in a language. Replies are longer with more `steps`,
or with `pauses`: tokens that say nothing after every state (pause tokens, 2310.02226).
"""

import json
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dppo_jax.files import Path

MODULUS, STEPS = 13, 10
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
EOS, PAUSE = "<|endoftext|>", "."
OPERATIONS = [sign + number for sign in "+*" for number in NUMBERS]


def _letters(number: int) -> str:
    """a to z, aa, ab, ..."""
    prefix, last = divmod(number, 26)
    return (_letters(prefix - 1) if prefix else "") + chr(ord("a") + last)


class Task(NamedTuple):
    """How states are spelled: by one of so many names, the k-th with a frequency of k^-tail (0: uniform). A chain has
    so many steps, and its reply so many pauses after every state."""

    spellings: int = 8
    tail: float = 0.0
    steps: int = STEPS
    pauses: int = 0

    @property
    def names(self) -> list[str]:
        return [_letters(number) for number in range(self.spellings)]

    @property
    def states(self) -> list[str]:
        return [f"{name}{residue}" for residue in range(MODULUS) for name in self.names]

    @property
    def vocabulary(self) -> list[str]:
        return [EOS, *self.states, *OPERATIONS, *([PAUSE] if self.pauses else [])]

    @property
    def first_operation(self) -> int:
        return 1 + MODULUS * self.spellings

    @property
    def prompt_tokens(self) -> int:
        return 1 + self.steps

    @property
    def reply_tokens(self) -> int:
        """The end-of-sequence token counts."""
        return self.steps * (1 + self.pauses) + 1

    def spell(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers of spellings."""
        if not self.tail:
            return rng.integers(self.spellings, size=shape)
        frequency = np.arange(1, self.spellings + 1) ** -self.tail
        return rng.choice(self.spellings, size=shape, p=frequency / frequency.sum())


TASK = Task()
SPELLINGS, STATES, VOCABULARY, FIRST_OPERATION = TASK.names, TASK.states, TASK.vocabulary, TASK.first_operation

TRAIN_SEED, HELD_OUT_SEED = 1, 2
SIZES = {"train": 2048, "held_out": 512}  # rows; 100 steps of 16 prompts see 1,600 of the first


class Chains(NamedTuple):
    """Examples as tokens. A reply ends in EOS."""

    prompts: np.ndarray  # i32[N, 1 + steps]
    replies: np.ndarray  # i32[N, reply_tokens]
    final: np.ndarray  # i64[N], the last state of the reply: the answer, where nothing slipped


def draw(rng: np.random.Generator, count: int, slip: float = 0.0, task: Task = TASK) -> Chains:
    """Start and operations, uniform, and spellings.

    slip: the chance that a step ends in another state than it should, uniform over the 12; the next goes on from there.
    """
    state = rng.integers(MODULUS, size=count)
    operations = rng.integers(len(OPERATIONS), size=(count, task.steps))
    spellings = task.spell(rng, (count, 1 + task.steps))
    slips = rng.random((count, task.steps)) < slip
    errors = np.where(slips, rng.integers(1, MODULUS, size=(count, task.steps)), 0)
    states = [state]
    for operation, error in zip(operations.T, errors.T, strict=True):
        operand = operation % MODULUS
        state = (np.where(operation < MODULUS, state + operand, state * operand) + error) % MODULUS
        states.append(state)
    spelled = 1 + task.spellings * np.stack(states, axis=1) + spellings
    prompts = np.concatenate([spelled[:, :1], task.first_operation + operations], axis=1)
    pauses = np.full((count, task.steps, task.pauses), len(task.vocabulary) - 1)
    said = np.concatenate([spelled[:, 1:, None], pauses], axis=2).reshape(count, -1)
    replies = np.concatenate([said, np.zeros((count, 1), int)], axis=1)
    return Chains(prompts.astype(np.int32), replies.astype(np.int32), state)


def rows(seed: int, count: int, task: Task = TASK) -> list[dict[str, str]]:
    """Prompts and answers as text."""
    chains, words = draw(np.random.default_rng(seed), count, task=task), task.vocabulary
    texts = [" ".join(words[token] for token in prompt) for prompt in chains.prompts]
    return [{"prompt": text, "answer": str(answer)} for text, answer in zip(texts, chains.final, strict=True)]


def write_prompts(directory: Path, task: Task = TASK) -> None:
    """train.jsonl and held_out.jsonl."""
    for name, seed in (("train", TRAIN_SEED), ("held_out", HELD_OUT_SEED)):
        lines = [json.dumps(row) + "\n" for row in rows(seed, SIZES[name], task)]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer(task: Task = TASK) -> Any:
    """One token a word. A word it does not know is an error: there is no token for it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(task.vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
