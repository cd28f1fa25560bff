"""From examples to token batches, and from tokens back to text."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from dppo_jax.data.chat import DATE, ChatRenderer, check_date
from dppo_jax.data.examples import LEFT_OUT, Example, Task
from dppo_jax.data.privileged import Privileged
from dppo_jax.data.tokenizer import eos_ids as eos_ids
from dppo_jax.data.tokenizer import load_tokenizer as load_tokenizer
from dppo_jax.errors import UserError, first_line
from dppo_jax.files import check_text
from dppo_jax.storage import fingerprints
from dppo_jax.types import PromptBatch

TOO_LONG = ("error", "skip")


class PromptEncoder:
    """Prompts to token ids, special tokens at the start included once. Use it in a `with`, or close it.

    template: text around "{prompt}", applied to a text prompt or to the last user message.
    chat: whether the tokenizer's chat template goes around it, open for the assistant's reply. A chat template writes
    its own special tokens, so its text is tokenized without adding any.
    chat_kwargs: further arguments of the chat template, by name; see `ChatRenderer`.
    date: what a chat template takes for today, YYYY-MM-DD.
    Raises: UserError, here for settings that cannot be, and in a call for a prompt that has no tokens, or others than
    its text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool,
        template: str = "{prompt}",
        chat_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
    ):
        if "{prompt}" not in template:
            raise UserError(f"data.template must hold '{{prompt}}', but is {template!r:.200}")
        check_text(template, "data.template")
        check_date(date)
        if chat_kwargs and not chat:
            raise UserError(f"data.chat_kwargs = {dict(chat_kwargs)!s:.200} are of a chat template; set data.chat=True")
        self._tokenizer, self._template = tokenizer, template
        self._render = ChatRenderer(tokenizer, date=date, arguments=chat_kwargs) if chat else None

    def close(self) -> None:
        """Ends the process that renders."""
        if self._render:
            self._render.close()

    def __enter__(self) -> "PromptEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, prompt: str | Sequence[dict[str, str]]) -> list[int]:
        """The ids of one prompt."""
        if self._render:
            text = self._render(conversation(prompt, self._template))
            ids = bare = token_ids(self._tokenizer, text, add_special_tokens=False)
        elif isinstance(prompt, str):
            text = self._template.replace("{prompt}", prompt)
            ids = token_ids(self._tokenizer, text)
            bare = token_ids(self._tokenizer, text, add_special_tokens=False)
            if bare and ids[-len(bare) :] != bare and ids[-1] == self._tokenizer.eos_token_id:
                ids = ids[:-1]  # this tokenizer ends what it encodes; a prompt stays open
        else:
            raise UserError("the data holds chat messages; set data.chat=True")
        if not ids:
            raise UserError("the prompt has no tokens")
        check_tokens(self._tokenizer, text, bare)
        return ids


def conversation(prompt: str | Sequence[dict[str, str]], template: str = "{prompt}") -> list[dict[str, str]]:
    """A prompt as messages, `template` applied to the last one of the user's."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    user_messages = [message for message in messages if message["role"] == "user"]
    if user_messages:
        user_messages[-1]["content"] = template.replace("{prompt}", user_messages[-1]["content"])
    return messages


def encode_prompt(tokenizer: Any, prompt: str | Sequence[dict[str, str]], *, chat: bool, **settings: Any) -> list[int]:
    """Token ids of one prompt; see `PromptEncoder`, which is for many, and takes the settings."""
    with PromptEncoder(tokenizer, chat=chat, **settings) as encode:
        return encode(prompt)


def encode_completion(tokenizer: Any, text: str, end: int) -> list[int]:
    """Token ids of what is to follow a prompt, `end` behind them once. UserError where there are none, or where they do
    not give the text back."""
    try:
        ids = token_ids(tokenizer, text, "completion", add_special_tokens=False)
        check_tokens(tokenizer, text, ids)
    except UserError as error:
        raise UserError(str(error).replace("prompt", "completion")) from None
    if not ids:
        raise UserError("the completion has no tokens")
    return ids if ids[-1] == end else [*ids, end]


def token_ids(tokenizer: Any, text: str, what: str = "prompt", **settings: bool) -> list[int]:
    """The ids of a text. UserError where the tokenizer cannot encode it; `what` it is, for the sentence."""
    try:
        return list(tokenizer(text, **settings)["input_ids"])
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"the tokenizer cannot encode the {what}: {first_line(error):.200}") from None


def check_tokens(tokenizer: Any, text: str, ids: list[int]) -> None:
    """UserError where the tokens lack something of the text, which the policy would never see.

    What the tokenizer's own normalizer changes may differ, case and compatible forms of characters too; white space
    may be another, more of it, or none beside special tokens, which may swallow it.
    """
    read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if read == text:
        return
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    text = text if normalizer is None else normalizer.normalize_str(text).replace("\u2581", " ")
    special = "|".join(map(re.escape, tokenizer.added_tokens_encoder))
    words = _words(re.sub(rf"\s*({special})\s*", r"\1", text) if special else text)
    words_read = _words(read)
    if "".join(words) == "".join(words_read) and _ends(words) <= _ends(words_read):
        return
    lacking = "".join(sorted({*text} - {*read}))
    fault = f"has no token for {lacking[:20]!r}" if lacking else "does not give its text back"
    raise UserError(f"the tokenizer {fault}, so the policy would see another prompt")


def _words(text: str) -> list[str]:
    """Between white space, which SentencePiece writes as a low line of its own."""
    return unicodedata.normalize("NFKC", text).casefold().replace("\u2581", " ").split()


def _ends(words: list[str]) -> set[int]:
    """Where they end in the text without white space."""
    return set(itertools.accumulate(map(len, words)))


def decode_replies(
    tokenizer, tokens: Int32[np.ndarray, "B R"], response_mask: Bool[np.ndarray, "B R"], eos_ids: Iterable[int]
) -> list[str]:
    """The text of each response: the end-of-sequence token dropped, every other token kept, special ones too.

    What the model wrote is what gets scored: no clean-up of spaces, and only the mask tells where a response ends.
    """
    tokens, response_mask, ends = np.asarray(tokens), np.asarray(response_mask), frozenset(eos_ids)
    replies = []
    for row, mask in zip(tokens, response_mask, strict=True):
        ids = row[mask].tolist()
        if ids and ids[-1] in ends:
            ids.pop()
        replies.append(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return replies


def left_padded(
    prompts: Sequence[Sequence[int]], length: int, pad_id: int = 0
) -> tuple[Int32[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    """Tokens of prompts, and where they are not padding."""
    tokens: np.ndarray = np.full((len(prompts), length), pad_id, np.int32)
    mask: np.ndarray = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return tokens, mask


def _labels(example: Example) -> str | list[str]:
    """The label; a list where there are several, or a verifier of their own."""
    if example.verifier:
        return [*example.labels, f"verifier: {example.verifier}"]
    return list(example.labels) if example.also else example.answer


class PromptStream:
    """The prompts of every step, as a function of (seed, step) alone: there is no state to save.

    Each epoch is one permutation of the examples, drawn from (seed, epoch); batches follow one another through the
    epochs, so a batch may span two. Every prompt is encoded at construction.

    num_prompts: N, prompts per step. max_prompt_len: P, in tokens, special tokens and chat template included.
    chat, template, chat_kwargs, date: see `PromptEncoder`.
    too_long: what becomes of a prompt of more than P tokens: "error", or "skip" (counted in `.skipped`).
    critic: what a critic sees in the prompt's place, encoded beside it, in no batch; a longer one than it allows counts
    as too long. None: what the policy sees.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        *,
        num_prompts: int,
        max_prompt_len: int,
        seed: int,
        chat: bool = False,
        template: str = "{prompt}",
        chat_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        too_long: str = "error",
        critic: Privileged | None = None,
    ):
        if num_prompts < 1:
            raise UserError(f"the number of prompts per step must be at least 1, not {num_prompts}")
        if max_prompt_len < 1:
            raise UserError(f"data.max_prompt_len must be at least 1, not {max_prompt_len}")
        if too_long not in TOO_LONG:
            raise UserError(f"data.too_long must be one of {TOO_LONG}, not {too_long!r}")
        self.num_prompts, self.max_prompt_len, self.seed = num_prompts, max_prompt_len, seed
        self.examples: list[Example] = []
        self.skipped = 0
        self._task = task
        self._critic, self._too_long = critic, too_long
        self._ids: list[list[int]] = []
        self._critic_ids: list[list[int]] = []  # none, where the critic sees what the policy sees
        # The padding id is never looked at: masks say what is padding.
        self._pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        settings: dict[str, Any] = dict(template=template, chat_kwargs=chat_kwargs, date=date)
        with PromptEncoder(tokenizer, chat=chat, **settings) as encode:
            for number, example in enumerate(task.examples, start=1):
                where = example.where or f"{task.name}: prompt {number} of {len(task.examples)}"
                encoded = self._encode(encode, example, where)
                if encoded is None:
                    self.skipped += 1
                    continue
                self.examples.append(example)
                self._ids.append(encoded[0])
                self._critic_ids += encoded[1:]
        distinct_prompts, distinct_ids = {str(example.prompt) for example in self.examples}, set(map(tuple, self._ids))
        if chat and len(distinct_ids) == 1 < len(distinct_prompts):
            raise UserError(
                f"{task.name}: all {len(self._ids)} prompts have the same tokens: the tokenizer's chat template leaves "
                "the messages out"
            )
        if not self.examples:
            beside = f", and the critic's into critic.max_prompt_len={critic.max_prompt_len}" if critic else ""
            raise UserError(f"{task.name}: no prompt fits into data.max_prompt_len={max_prompt_len} tokens{beside}")
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def _encode(self, encode: PromptEncoder, example: Example, where: str) -> list[list[int]] | None:
        """The ids of the policy's prompt, and of the critic's own; None where one of them is too long and skipped."""
        encoded = []
        try:
            encoded.append((encode(example.prompt), self.max_prompt_len, "data"))
            if self._critic:
                encoded.append((encode(self._critic.prompt(example)), self._critic.max_prompt_len, "critic"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for ids, most, section in encoded:
            if len(ids) > most:
                if self._too_long == "skip":
                    return None
                whose = " with what the critic sees" if section == "critic" else ""
                raise UserError(
                    f"{where} ({example.prompt!r:.60}){whose} has {len(ids)} tokens, more than "
                    f"{section}.max_prompt_len={most}; raise it, or set data.too_long='skip'"
                )
        return [ids for ids, *_ in encoded]

    def __len__(self) -> int:
        """Examples in an epoch."""
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """Of all token ids, the critic's own too, and gold answers: what a run draws its prompts from and scores by."""
        answers = (_labels(example) for example in self.examples)
        ids = self._ids
        if self._critic:
            ids = [[*own, -1, *critics] for own, critics in zip(ids, self._critic_ids, strict=True)]
        return fingerprints.of_prompts(zip(ids, answers, strict=True))

    @property
    def mean_prompt_length(self) -> float:
        """Of all examples, in tokens."""
        return sum(map(len, self._ids)) / len(self._ids)

    @property
    def counts(self) -> dict[str, int]:
        """ "examples" of an epoch, by the kinds of LEFT_OUT what the data holds beside them, and "duplicates"."""
        left_out = {**dict.fromkeys(LEFT_OUT, 0), **self._task.left_out, "skipped": self.skipped}
        return {"examples": len(self), **left_out, "duplicates": self._task.duplicates}

    @property
    def rows(self) -> int:
        """What the data holds, unused rows included."""
        counts = self.counts
        return sum(counts[kind] for kind in ("examples", *LEFT_OUT))

    @property
    def left_out(self) -> str | None:
        """A sentence on what is not used of the data; None where all is."""
        counts = self.counts
        kinds = LEFT_OUT | ({"skipped": f"{LEFT_OUT['skipped']}, or of critic.max_prompt_len"} if self._critic else {})
        parts = [f"{counts[kind]} {description}" for kind, description in kinds.items() if counts[kind]]
        return f"{self._task.name}: {counts['examples']} examples; left out: {', '.join(parts)}" if parts else None

    @property
    def remarks(self) -> list[str]:
        """Sentences on how the data is read, what of it is not used, and what stands there twice."""
        name, duplicates = self._task.name, self._task.duplicates
        twice = [f"{name}: {duplicates} examples repeat an earlier one's prompt and answer, and are kept"]
        said = [f"{name}: {remark}" for remark in self._task.remarks]
        return said + ([self.left_out] if self.left_out else []) + (twice if duplicates else [])

    def batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> tuple[PromptBatch, list[Example]]:
        """The N prompts of a step, counted from 0, as NumPy arrays, and their examples in the same order.

        rows: only these of the N, which is what a host that holds no others needs.
        """
        return self._pad(self._of_step(step), rows)

    def lengths(self, step: int) -> np.ndarray:
        """Of the N prompts of a step, in tokens, i[N]."""
        return np.array([len(self._ids[index]) for index in self._of_step(step)])

    def of_groups(self, origin: np.ndarray) -> tuple[list[Example], np.ndarray]:
        """Example, and length i[n] in tokens, of prompts by (step, number in its batch): origin i[n, 2]."""
        index = self._of_origin(origin)
        return [self.examples[i] for i in index], np.array([len(self._ids[i]) for i in index])

    def critic_prompts(self, origin: np.ndarray) -> list[list[int]] | None:
        """The ids of the critic's own prompts, by origin as in `of_groups`; None where it sees what the policy sees."""
        return [self._critic_ids[i] for i in self._of_origin(origin)] if self._critic else None

    def eval_batches(
        self, num_prompts: int, rows: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[tuple[PromptBatch, list[Example]]]:
        """Every example once, in file order. All batches have num_prompts rows; the last is filled up with rows of
        its first example, for which the list of examples has no entry. `rows` as in `batch`, increasing."""
        rows = range(num_prompts) if rows is None else rows
        for start in range(0, len(self.examples), num_prompts):
            index = list(range(start, min(start + num_prompts, len(self.examples))))
            batch, examples = self._pad(index + [start] * (num_prompts - len(index)), rows)
            yield batch, examples[: sum(row < len(index) for row in rows)]

    def _of_step(self, step: int) -> list[int]:
        """The examples of a step's prompts."""
        return self._at(range(step * self.num_prompts, (step + 1) * self.num_prompts))

    def _of_origin(self, origin: np.ndarray) -> list[int]:
        """The examples of prompts by (step, number in its batch)."""
        return self._at(int(step) * self.num_prompts + int(number) for step, number in origin)

    def _at(self, positions: Iterable[int]) -> list[int]:
        n = len(self.examples)
        return [int(self._permutation(position // n)[position % n]) for position in positions]

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def _pad(
        self, index: list[int], rows: Sequence[int] | np.ndarray | None = None
    ) -> tuple[PromptBatch, list[Example]]:
        """The batch of these examples, or those of its rows that are asked for."""
        rows = range(len(index)) if rows is None else rows
        tokens, mask = left_padded([self._ids[index[row]] for row in rows], self.max_prompt_len, self._pad_id)
        batch = PromptBatch(tokens=tokens, mask=mask, group=np.asarray(rows, np.int32))
        return batch, [self.examples[index[row]] for row in rows]
