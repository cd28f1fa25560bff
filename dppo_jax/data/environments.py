"""Environments as a task: the prompts that their conversations begin with. No jax here."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from typing import Any, cast

from dppo_jax.data.examples import Example, Task
from dppo_jax.data.gym import load_reasoning_gym
from dppo_jax.data.shapes import PLAIN, Reading
from dppo_jax.environments import ENVIRONMENTS
from dppo_jax.environments.play import KEY, Player
from dppo_jax.errors import UserError, nearest
from dppo_jax.rewards.own import own_file
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.worker import Outcome

SEEDS = 2**31 - 1  # of an environment, at most
WORKERS, TIME_LIMIT_S = 2, 60.0  # of the first observations


def load_environment(
    *,
    name: str | None,
    path: str | None,
    settings: dict[str, Any],
    size: int | None,
    seed: int,
    verifier: str,
    reading: Reading = PLAIN,
    max_turns: int = 1,
) -> Task:
    """`size` conversations with an environment, of the seeds `seed`, `seed` + 1, ...: their first observations are the
    prompts, and the verifier is a `Player`, which workers call with the policy's turns.

    name: a key of ENVIRONMENTS, FILE.py:CLASS, a reasoning-gym set, or an id of gem-llm where that is installed.
    UserError where there is none, or it does not begin as it should.
    """
    if not name:
        raise UserError(f"data.kind = 'environment' needs {KEY}: {', '.join(sorted(ENVIRONMENTS))}, or FILE.py:CLASS")
    size = 500 if size is None else size
    if seed + size - 1 > SEEDS:
        raise UserError(f"data.seed + data.size = {seed} + {size} seeds go beyond {SEEDS}: lower one of them")
    if name in _gym_sets():
        return _gym_task(name, settings, size, seed, max_turns, reading)
    if "max_turns" in settings and name in ENVIRONMENTS:
        raise UserError("data.settings holds 'max_turns'; set data.max_turns instead")
    player = Player(_whole_name(name), json.dumps(settings, sort_keys=True), max_turns)
    examples = [Example("", "", {"seed": seed + number}) for number in range(size)]
    task = Task(name, examples, player, isolated=True, worker_imports=("dppo_jax.environments.play",))
    return dataclasses.replace(task, examples=_begun(task))


def _gym_sets() -> frozenset[str]:
    from reasoning_gym.factory import DATASETS

    return frozenset(DATASETS)


def _gym_task(name: str, settings: dict, size: int, seed: int, max_turns: int, reading: Reading) -> Task:
    """A reasoning-gym set, its labels and its scorer checked as where it is asked once."""
    task = load_reasoning_gym(
        name=name, path=None, settings=settings, size=size, seed=seed, verifier="task", reading=reading
    )
    examples = [
        dataclasses.replace(example, meta={**example.meta, "seed": seed + number})
        for number, example in enumerate(task.examples)
    ]
    player = Player(name, "{}", max_turns, task.verify)
    imports = (*task.worker_imports, "dppo_jax.environments.play")
    return dataclasses.replace(task, examples=examples, verify=player, worker_imports=imports)


def _whole_name(name: str) -> str:
    """The name as workers find it; UserError where nothing has it."""
    file, _, class_name = name.rpartition(":")
    if file.endswith(".py") or name.endswith(".py"):
        if not class_name.isidentifier() or not file:
            raise UserError(f"{KEY} must be FILE.py:CLASS, such as my_game.py:Game, not {name!r:.200}")
        return f"{own_file(file, KEY)}:{class_name}"
    if name in ENVIRONMENTS:
        return name
    if ":" in name:
        if importlib.util.find_spec("gem") is None:
            raise UserError(
                f"{KEY} = {name!r:.200} is an environment of gem-llm, which is not installed; one of yours "
                "is FILE.py:CLASS"
            )
        return name
    raise UserError(f"unknown environment {name!r:.200}{nearest(name, {*ENVIRONMENTS, *_gym_sets()})}")


def _begun(task: Task) -> list[Example]:
    """The examples with their first observations, in workers; the first is asked for twice."""
    with Scorer(task, workers=WORKERS, time_limit_s=TIME_LIMIT_S) as scorer:
        scorer.ready()
        (first,) = _observed(scorer, task.examples[:1])
        outcomes = _observed(scorer, task.examples) if first.kind == "scored" else [first]
    for example, outcome in zip(task.examples[: len(outcomes)], outcomes, strict=True):
        if outcome.kind != "scored":
            raise UserError(f"{KEY} = {task.name!r:.200}: reset(seed={example.meta['seed']}) {_reason(outcome)}")
        if not outcome.said.text:
            raise UserError(f"{KEY} = {task.name!r:.200}: reset(seed={example.meta['seed']}) says nothing")
    if first.said != outcomes[0].said:
        raise UserError(
            f"{KEY} = {task.name!r:.200}: reset(seed={task.examples[0].meta['seed']}) gave two different observations; "
            "it must be a function of its seed"
        )
    return [
        dataclasses.replace(example, prompt=outcome.said.text)
        for example, outcome in zip(task.examples, outcomes, strict=True)
    ]


def _observed(scorer: Scorer, examples: Sequence[Example]) -> list[Outcome]:
    """What conversations begin with."""
    return list(scorer.submit(cast(list[str], [()] * len(examples)), examples).outcomes())


def _reason(outcome: Outcome) -> str:
    if outcome.kind == "killed":
        return "ran over its time or memory, or ended its process"
    return f"fails: {outcome.message:.200}"
