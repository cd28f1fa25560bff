"""reasoning-gym tasks, with every label checked at load. Reward workers import this, so no jax here."""

import contextlib
import functools
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np

from dppo_jax.data.arithmetic import exact_value
from dppo_jax.data.examples import Example, Task, answer_task
from dppo_jax.errors import UserError, first_line, lookup, nearest
from dppo_jax.rewards.verifiers import answer_fault, extract_answer

NONSENSE = "I do not know."  # no scorer may accept it

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
    """The data set's own scorer on the extracted answer, thresholded at 1.0: many give partial credit to nonsense.

    Some of these scorers evaluate the reply as an expression: worker processes bound their time and memory, but are
    no sandbox.
    """

    name: str
    settings: str  # JSON

    def __call__(self, reply: str, example: Example) -> float:
        scorer = _gym_dataset(self.name, self.settings)
        try:
            return float(scorer.score_answer(extract_answer(reply), example.meta["entry"]) >= 1.0)
        except MemoryError:
            raise
        except Exception:  # what the scorer cannot read is not the answer
            return 0.0


@functools.lru_cache(maxsize=4)
def _gym_dataset(name: str, settings: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(settings))


def load_reasoning_gym(
    *, name: str | None, path: str | None, settings: dict[str, Any], size: int | None, seed: int, verifier: str
) -> Task:
    """Any reasoning-gym data set, its examples generated from (settings, seed), every label checked."""
    from reasoning_gym.factory import DATASETS

    if not name:
        raise UserError("data.kind='reasoning_gym' needs data.name, such as 'products'")
    if path:
        raise UserError(f"data.kind='reasoning_gym' generates its examples; unset data.path={path!r}")
    _, config_class = lookup(DATASETS, name, "reasoning-gym data set")
    known = {f.name for f in fields(config_class)} - {"seed", "size"}
    for key in settings:
        if key in ("seed", "size"):
            raise UserError(f"data.settings holds {key!r}; set data.{key} instead")
        if key not in known:
            raise UserError(f"data.settings: reasoning-gym {name!r} has no setting {key!r}{nearest(key, known)}")
    size = 500 if size is None else size
    try:
        arguments = json.dumps({**settings, "seed": seed, "size": size})
        dataset = _gym_dataset(name, arguments)
    except Exception as error:
        raise UserError(f"reasoning-gym {name!r} refuses data.settings={settings}: {first_line(error)}") from error

    examples = []
    # list_functions draws from the global `random`, bf prints.
    with _global_randomness(seed), contextlib.redirect_stdout(io.StringIO()):
        for i in range(size):
            try:
                entry = dataset[i]
            except Exception as error:
                raise UserError(
                    f"reasoning-gym {name!r} cannot make item {i} with data.settings={settings}: {first_line(error)}"
                ) from error
            _check_gym_label(name, i, dataset, entry, verifier)
            answer = "" if entry["answer"] is None else str(entry["answer"])
            examples.append(Example(entry["question"], answer, {"entry": entry}))
    if verifier == "task":
        verify = GymVerifier(name, arguments)
        return Task(name, examples, verify, isolated=True, worker_imports=("reasoning_gym",))
    return answer_task(name, examples, verifier)


def _check_gym_label(name: str, i: int, dataset, entry: dict[str, Any], verifier: str) -> None:
    """Raises: UserError where the label is wrong, or the verifier could not tell a right answer from nonsense."""
    item, label = f"reasoning-gym {name!r}, item {i}", entry["answer"]
    if verifier != "task":
        fault = "is missing" if label is None else answer_fault(verifier, str(label))
        if fault:
            raise UserError(f"{item}: the answer {label!r:.60} {fault}; set data.verifier='task'")
    if label is not None and not dataset.score_answer(label, entry) >= 1.0:
        raise UserError(
            f"{item}: the data set's own scorer does not accept the label {label!r:.60}; "
            "choose other data.settings or another data.name"
        )
    if name in ARITHMETIC:
        value = _exact_or_fault(entry["metadata"]["expression"])
        if value != _label_value(label):
            raise UserError(
                f"{item}: wrong label: {entry['metadata']['expression']} is {value}, but the label says {label}; "
                f"{ARITHMETIC[name]}"
            )
    if verifier == "task":
        try:
            accepts_nonsense = dataset.score_answer(NONSENSE, entry) >= 1.0
        except Exception:
            accepts_nonsense = False
        if accepts_nonsense:
            raise UserError(
                f"{item}: the data set's own scorer gives {NONSENSE!r} a full score; set data.verifier='exact_match'"
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
