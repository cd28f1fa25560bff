"""Published shapes of rows: which columns hold prompt and answer, and how the gold answer is cut out of a solution.

A shape is a row of `SHAPES`. Nothing here imports jax: reward workers may.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import regex

from dppo_jax.errors import UserError, nearest
from dppo_jax.rewards.maths import last_box

BAD_LABEL = ("error", "drop")
HASHES, BOXED = "####", "boxed"
CUT_LIMIT_S = 2.0  # of a regular expression, on one answer
_BARE_BOX = re.compile(r"\\boxed\s+([^$\n{}]+?)\s*(?:\$|$)", re.MULTILINE)  # \boxed 5$, as a few of MATH are written
_FRAME = re.compile(r"\\fbox(?=\s*\{)")


class Shape(NamedTuple):
    """Where rows have their prompt and their answer. Of `prompt` a row has one; `answer` may be dotted: a.b is b of a;
    "": rows have none.

    cut: as data.answer_from. marked: only rows of which most answers hold what `cut` looks for have this shape.
    """

    name: str
    prompt: tuple[str, ...]
    answer: str
    cut: str = ""
    marked: bool = False

    def __str__(self) -> str:
        how = {"": "", HASHES: f" after {HASHES}", BOXED: " in \\boxed"}.get(self.cut, f" by {self.cut!r}")
        answer = f"answer: {self.answer}{how}" if self.answer else "no answer is read"
        return f"{self.name} (prompt: {' or '.join(self.prompt)}; {answer})"


OWN = Shape("", ("prompt", "messages"), "answer")  # ours, TRL's {prompt, answer}, and verifiers' {prompt, answer}

# The first that fits counts. DAPO-Math-17k is verl's, its processed form too.
SHAPES = (
    OWN,
    Shape("GSM8K", ("question",), "answer", HASHES, marked=True),
    Shape("question and answer", ("question",), "answer"),  # verifiers, AMC 2023, AIME 2025
    Shape("problem and answer", ("problem",), "answer"),  # MATH-500, AIME 2024 and 2025, AMC
    Shape("MATH", ("problem",), "solution", BOXED),
    Shape("AIME_2024", ("Problem",), "Answer"),
    Shape("verl", ("prompt",), "reward_model.ground_truth"),
    Shape("SkyRL", ("prompt",), "reward_spec.ground_truth"),
    Shape("RLVR", ("messages",), "ground_truth"),
    Shape("TRL", ("prompt",), "solution", BOXED, marked=True),
    Shape("TRL", ("prompt",), "solution"),
)
COLUMNS = frozenset(path.split(".")[0] for shape in SHAPES for path in (*shape.prompt, shape.answer))


class Reading(NamedTuple):
    """How rows become examples: the keys of data.columns, data.answer_from, data.bad_label, the folder in which checks
    of labels are kept ("": nowhere), and whether the assistant's last turn is the answer of messages that end with
    one."""

    prompt: str = ""
    answer: str = ""
    verifier: str = ""
    answer_from: str = ""
    bad_label: str = "error"
    label_cache: str = ""
    last_turn: bool = False

    @property
    def columns(self) -> frozenset[str]:
        """Columns of a table that may be asked for: of the shapes, and those that are named."""
        paths = self.prompt, self.answer, self.verifier
        named = {name for path in paths for name in (path, path.split(".")[0])}
        return COLUMNS | (named - {""})


PLAIN = Reading()  # everything recognised, and no label dropped


def check_reading(reading: Reading) -> None:
    """UserError for an answer_from or a bad_label that cannot be."""
    if reading.bad_label not in BAD_LABEL:
        raise UserError(f"unknown data.bad_label {reading.bad_label!r:.80}{nearest(reading.bad_label[:80], BAD_LABEL)}")
    text = reading.answer_from
    if text in ("", HASHES, BOXED):
        return
    try:
        groups = re.compile(text).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"data.answer_from = {text!r:.80} is no regular expression: {error}") from None
    if groups != 1:
        close = nearest(text[:80], (HASHES, BOXED)).split("; known")[0]
        raise UserError(
            f"data.answer_from = {text!r:.80} must be '{HASHES}', '{BOXED}' or a regular expression with one group, "
            f"but has {groups} groups{close}"
        )


def recognise(rows: Sequence[tuple[str, Any]], reading: Reading) -> Shape:
    """The shape of rows, each with its place: that of the first, and how most of the answers are written.

    Raises: UserError where the first row has none, or lacks a column that data.columns names.
    """
    where, row = rows[0]
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt' or 'messages' and 'answer', got {shown(row)}")
    for key, path in (("prompt", reading.prompt), ("answer", reading.answer), ("verifier", reading.verifier)):
        if path and not has(row, path):
            raise UserError(_lacks(where, row, path, f"data.columns.{key}"))
    shape = _first(rows, row, reading)
    if reading.answer:
        shape = shape._replace(answer=reading.answer, cut="")
    if reading.answer_from:
        shape = shape._replace(cut=reading.answer_from)
    if reading.prompt:
        shape = shape._replace(prompt=(reading.prompt,))
    named = reading.prompt or reading.answer or (reading.answer_from and not shape.name)
    return shape._replace(name="rows") if named else shape


def prompts_alone(rows: Sequence[tuple[str, Any]], reading: Reading) -> Shape:
    """The shape of rows of which no answer is read: the column that data.columns.prompt names, or the first of those of
    SHAPES that the first row has. UserError where it has neither."""
    where, row = rows[0]
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt' or 'messages', got {shown(row)}")
    if reading.prompt and not has(row, reading.prompt):
        raise UserError(_lacks(where, row, reading.prompt, "data.columns.prompt"))
    columns = [reading.prompt] if reading.prompt else [name for shape in SHAPES for name in shape.prompt]
    found = [name for name in dict.fromkeys(columns) if find(row, name) is not None]
    if not found:
        raise UserError(
            f"{where}: has neither of 'prompt' and 'messages', of which it needs one; keys: {sorted(row)!s:.200}; "
            "another column is named by data.columns.prompt"
        )
    return Shape("prompts", (found[0],), "")


def _first(rows: Sequence[tuple[str, Any]], row: Mapping[str, Any], reading: Reading) -> Shape:
    """The first of SHAPES that the row has, but for what data.columns names."""
    if reading.prompt and reading.answer:
        return OWN
    for shape in SHAPES:
        asked = reading.prompt or any(row.get(name) is not None for name in shape.prompt)
        answered = reading.answer or (has(row, shape.answer) and (not shape.marked or _most(rows, shape)))
        if asked and answered:
            return shape
    where, keys = rows[0][0], f"keys: {sorted(row)!s:.200}"
    if not reading.prompt and not any(row.get(name) is not None for shape in SHAPES for name in shape.prompt):
        raise UserError(
            f"{where}: has neither of 'prompt' and 'messages', of which it needs one; {keys}; another column is named "
            "by data.columns.prompt"
        )
    raise UserError(f"{where}: has no 'answer'; {keys}; another column is named by data.columns.answer")


def _most(rows: Sequence[tuple[str, Any]], shape: Shape) -> bool:
    """Whether most of the rows that have the shape's columns hold what it cuts out."""
    of_shape = [row for _, row in rows if isinstance(row, dict) and any(name in row for name in shape.prompt)]
    answers = [find(row, shape.answer) for row in of_shape]
    return 2 * sum(isinstance(text, str) and cut(text, shape.cut) is not None for text in answers) > len(answers)


def fields(where: str, row: Any, shape: Shape) -> tuple[str, Any, Any]:
    """Of a row: the column of its prompt, the prompt, and the answer, which is None where the row has null, or the
    shape has no answers.

    Raises: UserError for a row that lacks a column.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt' or 'messages' and 'answer', got {shown(row)}")
    keys = f"keys: {sorted(key for key, value in row.items() if value is not None)!s:.200}"
    columns = [name for name in shape.prompt if find(row, name) is not None]
    if len(shape.prompt) > 1 and len(columns) != 1:
        number, names = "both" if columns else "neither", " and ".join(map(repr, shape.prompt))
        raise UserError(f"{where}: has {number} of {names}, of which it needs one; {keys}")
    read_as = "" if not shape.name else f", but the rows are read as {shape}"
    if not columns:
        raise UserError(f"{where}: has no {shown(shape.prompt[0])}{read_as}; {keys}")
    if not shape.answer:
        return columns[0], find(row, columns[0]), None
    if not has(row, shape.answer):
        raise UserError(f"{where}: has no {shown(shape.answer)}{read_as}; {keys}")
    return columns[0], find(row, columns[0]), find(row, shape.answer)


def has(row: Any, path: str) -> bool:
    """Whether the row has the column; its value may be null."""
    if path in row:
        return True
    *outer, last = path.split(".")
    inner = functools.reduce(lambda at, name: at.get(name) if isinstance(at, dict) else None, outer, row)
    return bool(outer) and isinstance(inner, dict) and last in inner


def find(row: Mapping[str, Any], path: str) -> Any:
    """The value at a column; None where the row lacks it. A name with a dot may also be a column of its own."""
    if path in row:
        return row[path]
    at: Any = row
    for name in path.split("."):
        at = at.get(name) if isinstance(at, dict) else None
    return at


def _lacks(where: str, row: Mapping[str, Any], path: str, key: str) -> str:
    return f"{where}: has no column {shown(path)}, which {key} names{nearest(path[:200], _paths(row))}"[:500]


def _paths(row: Mapping[str, Any]) -> Iterator[str]:
    """The columns of a row, and what stands one level inside them."""
    for name, value in row.items():
        yield name[:80]
        if isinstance(value, dict):
            yield from (f"{name[:80]}.{inner}"[:160] for inner in value if isinstance(inner, str))


def cut(text: str, how: str) -> str | None:
    """The gold answer that a text holds, by data.answer_from; None where it holds none.

    how: "" (all of it), "####" (what follows the last one), "boxed" (in the last \\boxed{...}), or a regular expression
    (its one group, where it matches last). UserError for one that takes longer than CUT_LIMIT_S.
    """
    if not how:
        return text
    found: str | None = None
    if how == HASHES:
        found = text.rpartition(HASHES)[2] if HASHES in text else None
    elif how == BOXED:
        if "box" not in text:
            return None
        text = _FRAME.sub(r"\\boxed", text)
        found = last_box(text)
        if found is None:
            found = next(iter(reversed(_BARE_BOX.findall(text))), None)
    else:
        try:
            for match in regex.finditer(how, text, timeout=CUT_LIMIT_S):
                found = match[1]
        except TimeoutError:
            raise UserError(f"data.answer_from = {how!r:.80} takes more than {CUT_LIMIT_S:g} s of one answer") from None
    return found.strip() or None if found is not None else None


def cut_fault(how: str) -> str:
    """What a text lacks in which `cut` finds nothing, for the end of a sentence."""
    lacking = {HASHES: f"holds nothing after {HASHES!r}", BOXED: "holds no \\boxed{...}"}
    return f"{lacking.get(how, f'does not match {how!r:.80}')}, from which the gold answer is taken"


def shown(value: Any, length: int = 80) -> str:
    """A value inside a sentence: one line, and short."""
    text = repr(value[:length] if isinstance(value, str) else value)
    return text if len(text) <= length + 4 else f"{text[:length]}..."
