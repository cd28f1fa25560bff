"""Tasks by kind: where the examples come from and how replies are scored."""

from collections.abc import Mapping
from typing import Any

from dppo_jax.data.environments import load_environment
from dppo_jax.data.examples import UNSCORED, Example, Task
from dppo_jax.data.gym import load_reasoning_gym
from dppo_jax.data.hub import load_hub
from dppo_jax.data.rows import load_jsonl, load_parquet
from dppo_jax.data.shapes import Reading, check_reading
from dppo_jax.errors import UserError, lookup
from dppo_jax.rewards.verifiers import VERIFIERS

__all__ = ["TASKS", "Example", "Task", "load_task"]

MOST_GENERATED = 1_000_000
GENERATED = {"reasoning_gym": 2000, "environment": 500}  # examples, where no size is given
TASKS = {
    "reasoning_gym": load_reasoning_gym,
    "jsonl": load_jsonl,
    "parquet": load_parquet,
    "hub": load_hub,
    "environment": load_environment,
}


def load_task(
    kind: str,
    *,
    name: str | None = None,
    path: str | None = None,
    settings: Mapping[str, Any] | None = None,
    subset: str = "",
    split: str = "train",
    revision: str = "",
    size: int | None = None,
    seed: int = 0,
    verifier: str = "task",
    columns: Mapping[str, str] | None = None,
    answer_from: str = "",
    bad_label: str = "error",
    label_cache: str = "",
    last_turn: bool = False,
    max_turns: int = 1,
) -> Task:
    """Loads a task and checks every label.

    kind: a key of TASKS. "reasoning_gym" reads name, settings, size (number of examples, default GENERATED) and seed;
    "jsonl" and "parquet" read path (a file, a folder or a pattern), size (at most so many rows, default all), columns
    ("prompt", "answer"; those that are not named are recognised; "verifier", a row's own), answer_from and bad_label;
    "hub" reads the same of name, subset, split and revision (see `storage.hub`); "environment" reads name, settings,
    size, seed and max_turns (see `data.environments`).
    verifier: a key of VERIFIERS, or "task" for the data set's own scorer, of which only a full score counts, or "none",
    with which rows need no answer and every reply scores 0.
    label_cache: a folder in which checks of labels are kept for later ("": nowhere).
    last_turn: of rows of messages that end with the assistant's turn, that turn is the answer; see `split_last_turn`.
    """
    if size is not None and size < 1:
        raise UserError(f"data.size must be at least 1, not {size}")
    load = lookup(TASKS, kind, "data.kind")
    if kind in ("reasoning_gym", "environment"):
        size = GENERATED[kind] if size is None else size
        if size > MOST_GENERATED:
            raise UserError(
                f"data.size must be at most {MOST_GENERATED:,} for {kind}, not {size:,}: all are generated and "
                "checked at the start"
            )
    if verifier != "task":
        lookup({**VERIFIERS, "task": None, UNSCORED: None}, verifier, "data.verifier")
    named = dict(answer_from=answer_from, bad_label=bad_label, label_cache=label_cache)
    reading = Reading(**(columns or {}), **named, last_turn=last_turn)
    check_reading(reading)
    where: dict[str, Any] = {"subset": subset, "split": split, "revision": revision} if kind == "hub" else {}
    if kind == "environment":
        where = {"max_turns": max_turns}
    return load(
        name=name,
        path=path,
        settings=dict(settings) if settings else {},
        size=size,
        seed=seed,
        verifier=verifier,
        reading=reading,
        **where,
    )
