"""Groups in flight over the steps of a run (rollout.in_flight): which prompts join them, what a checkpoint holds."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.devices import hosts
from dppo_jax.devices.sharding import laid_out
from dppo_jax.models.decoder import Params
from dppo_jax.rollout import Finished, Flight, InFlight, OneCall
from dppo_jax.sampling import purpose_key
from dppo_jax.types import PromptBatch
from experiments.run.rollouts import Calls, in_chunks, rollout_in_flight, steps_of_call, training_rollout
from experiments.run.runs import Runs
from experiments.run.setup import ROLLOUT, Setup

NAME = "in_flight"  # in a checkpoint


def finished_shardings(setup: Setup, **of_rows: Any) -> Finished:
    """Of what a step trains: rows over the batch axes, numbers everywhere; `of_rows` are further fields."""
    rows = ("prompts", "rollout", "age", "origin")
    numbers = ("age_mean", "age_max", "rows_left", "work")
    fields: dict[str, Any] = dict.fromkeys(rows, setup.by_row) | dict.fromkeys(numbers, setup.everywhere)
    return Finished(**fields, **of_rows)


class Kept:
    """What is in flight, in checkpoints: those of any number of shards. `draws` is what draws one run's."""

    def __init__(self, runs: Runs, draws: InFlight):
        self._runs = runs
        length, by_row = runs.base.config.data.max_prompt_len, runs.base.by_row
        self.empty = jax.jit(lambda: runs.together([draws.empty(length)] * len(runs)), out_shardings=by_row)
        self._dealt = jax.jit(runs.each(draws.dealt), out_shardings=by_row)

    def shapes(self, held: Any = None) -> dict[str, Any]:
        """Shapes and shardings of a flight: of one that a checkpoint has with these shapes, or of this run's."""
        flight = laid_out(jax.eval_shape(self.empty), self._runs.base.by_row)
        if held is not None and held["count"].shape != flight.count.shape:
            of_shards = jax.ShapeDtypeStruct(held["count"].shape, jnp.int32)
            flight = dataclasses.replace(flight, count=laid_out(of_shards, self._runs.base.everywhere))
        return {NAME: flight}

    def restored(self, flight: Any, step: int) -> tuple[Any, int]:
        """A flight from a checkpoint on the shards there are, and how many batches of prompts had joined it."""
        if flight.count.shape != jax.eval_shape(self.empty).count.shape:
            flight = self._dealt(flight)
        count = jnp.sum(self._runs.apart(flight)[0].count)  # the same of every run
        return flight, step + int(count) // self._runs.base.config.rollout.prompts


class Carried:
    """What is in flight of every run. `prompts_of` gives the prompts of a step, of all runs, on the devices."""

    def __init__(self, runs: Runs, prompts_of: Callable[[int], PromptBatch]):
        base = runs.base
        self._runs, self._prompts_of, self._config = runs, prompts_of, base.config
        in_flight = rollout_in_flight(base, training_rollout(base, topk=runs.topk, entropy=runs.needs_entropy))
        by_row, everywhere, finished = base.by_row, base.everywhere, finished_shardings(base)
        self._kept = Kept(runs, in_flight)
        self._join = jax.jit(runs.each(in_flight.join), donate_argnums=0, out_shardings=by_row)
        arguments, results = (None, by_row, everywhere, everywhere), (by_row, finished)
        most = steps_of_call(runs, in_flight.rollout, in_flight.places * in_flight.rollout.group_size)
        self._draw: Calls = OneCall(
            jax.jit(runs.each(in_flight), in_shardings=arguments, out_shardings=results, donate_argnums=1)
        )
        if most:
            stages = in_flight.begin, in_flight.rollout.draw, in_flight.end
            self._draw = in_chunks(base, *stages, most, arguments=arguments, results=results)
        self._flight: Flight | None = None
        self._joined = 0  # batches of prompts

    def start(self, params: Params, step: int) -> Callable[[], Finished]:
        """Has the devices draw what a step trains, of all runs, from whole parameters; call the result for that.

        What is in flight before the step stays until then: the rollout may be abandoned.
        """
        runs, last = self._runs, min(step + self._config.rollout.in_flight, self._config.steps - 1)
        flight = self._flight if self._flight is not None else self._kept.empty()
        for batch in range(self._joined, last + 1):
            flight = self._join(flight, self._prompts_of(batch), self._number(batch))
        keys = runs.together([purpose_key(run.config.seed, ROLLOUT) for run in runs.setups])
        self._flight, self._joined = flight, last + 1
        started = self._draw.start(params, flight, keys, self._number(step))

        def finish() -> Finished:
            self._flight, finished = self._draw.finish(started)
            return finished

        return finish

    def _number(self, value: int) -> Any:
        return self._runs.together([np.int32(value)] * len(self._runs))

    # --- checkpoints ---

    def saved(self) -> dict[str, Any]:
        """What a checkpoint needs of the groups in flight."""
        return {NAME: self._flight}

    def shapes(self, held: Any) -> dict[str, Any]:
        """Shapes and shardings of what `saved` gives, or of what a checkpoint has."""
        return self._kept.shapes(held)

    def restore(self, saved: dict[str, Any], step: int) -> None:
        """At a step, from a checkpoint."""
        self._flight, self._joined = self._kept.restored(saved[NAME], step)
        beyond = (self._joined - self._config.steps) * self._config.rollout.prompts
        if beyond > 0 and hosts.is_writer():
            print(f"steps was lowered: {beyond} groups that are in flight will not be trained", file=sys.stderr)
