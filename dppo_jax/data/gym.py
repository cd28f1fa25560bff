"""reasoning-gym tasks, with every label checked at load. Reward workers import this, so no jax here."""

import contextlib
import copy
import functools
import io
import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np

from dppo_jax.data.arithmetic import exact_value
from dppo_jax.data.examples import UNSCORED, Example, Task
from dppo_jax.data.grammar import is_answer
from dppo_jax.data.labels import with_good_labels
from dppo_jax.data.shapes import PLAIN, Reading
from dppo_jax.data.wrong_answers import wrong_answers
from dppo_jax.errors import UserError, first_line, lookup, nearest
from dppo_jax.rewards.answers import answer_task
from dppo_jax.rewards.verifiers import REFUSED, extract_answer, text_fault

# Families whose metadata holds the expression, and what to change where reasoning-gym labels it wrongly: 0.1.25
# evaluates basic_arithmetic without parentheses from left to right, ignoring precedence, and prints another divisor
# than it divides by; with parentheses, four terms and more, a "/" may leave a remainder that the label drops.
ARITHMETIC = {
    "basic_arithmetic": "set data.settings.operators to ['+', '-'], or to ['+', '-', '*'] with allow_parentheses=True",
    "chain_sum": "choose other data.settings",
    "decimal_chain_sum": "choose other data.settings",
    "products": "choose other data.settings",
}


@dataclass(frozen=True)
class GymVerifier:
    """The data set's own scorer on the extracted answer, of which only a full score counts: many give partial credit
    to nonsense, and some more than a full score to what is wrong.

    Some of these scorers pass over what they do not know, and would take "not" before the answer for the answer: they
    too are given a reply only where it has the form of an answer (`grammar.FORMS`).

    Nine of these scorers evaluate the reply. They are given it only where it is in the grammar of the set's answers
    (`grammar.EVALUATED`), in which nothing can be named or called but the question's own algebra; any other reply is
    not read: `REFUSED`, a 0 that is counted. So no reply runs as code. What an answer within the grammar may still do
    is take long or much memory, which workers bound; they are closed in besides (`rewards.sandbox`).
    """

    name: str
    settings: str  # JSON

    def __call__(self, reply: str, example: Example) -> float:
        dataset = _gym_dataset(self.name, self.settings)
        return full_score(dataset, self.name, extract_answer(reply), example.meta["entry"])


def full_score(dataset, name: str, answer: str, entry: dict[str, Any]) -> float:
    """1.0 where the data set's scorer gives exactly 1 to the answer; `REFUSED`, a 0, where it must not read it."""
    if not is_answer(name, answer, entry):
        return REFUSED
    try:
        return float(dataset.score_answer(answer, entry) == 1.0)
    except MemoryError:
        raise
    except Exception:  # what the scorer cannot read is not the answer
        return 0.0


@functools.lru_cache(maxsize=4)
def _gym_dataset(name: str, settings: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(settings))


def load_reasoning_gym(
    *,
    name: str | None,
    path: str | None,
    settings: dict[str, Any],
    size: int | None,
    seed: int,
    verifier: str,
    reading: Reading = PLAIN,
) -> Task:
    """Any reasoning-gym data set, its examples generated from (settings, seed), every label checked."""
    from reasoning_gym.factory import DATASETS

    if not name:
        raise UserError("data.kind='reasoning_gym' needs data.name, such as 'products'")
    if path:
        raise UserError(f"data.kind='reasoning_gym' generates its examples; unset data.path={path!r}")
    _, config_class = lookup(DATASETS, name, "reasoning-gym data set")
    allowed = {f.name for f in fields(config_class)} - {"seed", "size"}
    for key in settings:
        if key in ("seed", "size"):
            raise UserError(f"data.settings holds {key!r}; set data.{key} instead")
        if key not in allowed:
            raise UserError(f"data.settings: reasoning-gym {name!r} has no setting {key!r}{nearest(key, allowed)}")
    size = 500 if size is None else size
    try:
        arguments = json.dumps({**settings, "seed": seed, "size": size})
        dataset = _gym_dataset(name, arguments)
    except Exception as error:
        raise UserError(f"reasoning-gym {name!r} refuses data.settings={settings}: {first_line(error)}") from error

    found: list[tuple[Example, str | None]] = []  # with what is wrong with its label
    previous_label: str | None = None  # the item before's label
    # list_functions draws from the global `random`, bf prints.
    with _global_randomness(seed), contextlib.redirect_stdout(io.StringIO()):
        for i in range(size):
            where = f"reasoning-gym {name!r}, item {i}"
            try:
                entry = dataset[i]
            except Exception as error:
                raise UserError(
                    f"reasoning-gym {name!r} cannot make item {i} with data.settings={settings}: {first_line(error)}"
                ) from error
            fault = None if verifier == UNSCORED else _label_fault(name, dataset, entry, verifier)
            if fault and reading.bad_label == "error":
                raise UserError(f"{where}: {fault}")
            if verifier == "task":
                _check_scorer(name, i, dataset, entry, previous_label)
            if entry["answer"] is not None:
                previous_label = str(entry["answer"])
            answer = "" if entry["answer"] is None else str(entry["answer"])
            found.append((Example(entry["question"], answer, {"entry": entry}, where), fault))
    good = with_good_labels(f"reasoning-gym {name!r}", found, verifier, reading)
    left_out = {"bad_label": len(found) - len(good)}
    if verifier == "task":
        verify = GymVerifier(name, arguments)
        return Task(name, good, verify, isolated=True, worker_imports=("reasoning_gym",), left_out=left_out)
    return answer_task(name, good, verifier, left_out)


def _label_fault(name: str, dataset, entry: dict[str, Any], verifier: str) -> str | None:
    """Why the label is wrong, or the verifier cannot accept it; None where neither is so."""
    label = entry["answer"]
    if verifier != "task":
        fault = "is missing" if label is None else text_fault(verifier, str(label))
        if fault:
            return f"the answer {label!r:.60} {fault}; set data.verifier='task'"
    if label is not None and full_score(dataset, name, extract_answer(str(label)), copy.deepcopy(entry)) != 1.0:
        return (
            f"the data set's own scorer does not accept the label {label!r:.60}; choose other data.settings or another "
            "data.name, or set data.bad_label='drop'"
        )
    if name in ARITHMETIC:
        value = _exact_or_fault(entry["metadata"]["expression"])
        if value != _label_value(label):
            expression = entry["metadata"]["expression"]
            return f"wrong label: {expression} is {value}, but the label says {label}; {ARITHMETIC[name]}"
    return None


def _check_scorer(name: str, i: int, dataset, entry: dict[str, Any], other_label: str | None) -> None:
    """Raises: UserError where the data set's own scorer gives a wrong answer a full score. other: another label."""
    label = None if entry["answer"] is None else str(entry["answer"])
    for wrong in wrong_answers(name, label, other_label):
        with warnings.catch_warnings(action="ignore"):
            score = full_score(dataset, name, wrong, copy.deepcopy(entry))
        if score == 1.0:
            better = "" if label is None else "set data.verifier='exact_match', or "
            raise UserError(
                f"reasoning-gym {name!r}, item {i}: the data set's own scorer gives the wrong answer {wrong!r:.60} "
                f"a full score; {better}choose another data.name (the label is {label!r:.60})"
            )


def _exact_or_fault(expression: str) -> Fraction | str:
    try:
        return exact_value(expression)
    except (ValueError, SyntaxError, ZeroDivisionError) as error:
        return f"undefined ({error})"


def _label_value(label: str) -> Fraction | None:
    try:
        return Fraction(Decimal(label))
    except (InvalidOperation, ValueError, OverflowError):
        return None


@contextlib.contextmanager
def _global_randomness(seed: int) -> Iterator[None]:
    """Seeds the global generators, which some data sets draw from or reseed, and puts back what was there."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
