"""How many tokens differ, to the bit, between rollout and training: with exact rollouts, and without.

    python -m experiments.questions.mismatch.exact --config configs/quickstart.py --tokens 100000

Both draw with policy.dtype and one response a row, and train as the config says. Of every batch each minibatch is seen
by the compiled update at the parameters that drew it: the loss counts the tokens whose logp and behavior_logp differ.
Prints a line for each, and how much longer an exact rollout takes.
"""

import dataclasses
import time
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from dppo_jax.errors import UserError, run_main
from dppo_jax.losses.core import BoundLoss
from dppo_jax.train_step import jit_update
from dppo_jax.types import LossInputs, LossOutput
from experiments.probe import Probe
from experiments.run import cli


def bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def counting(loss: BoundLoss) -> BoundLoss:
    """The loss, which also counts the tokens whose two log-probabilities differ."""

    def counted(inputs: LossInputs) -> LossOutput:
        output = loss(inputs)
        differ = (bits(inputs.logp) != bits(inputs.behavior_logp)).astype(jnp.float32)
        return dataclasses.replace(output, metrics={**output.metrics, "differ": (differ, inputs.mask)})

    return counted


class Side:
    """A config with exact rollouts or without, and what was counted of it."""

    def __init__(self, config: ConfigDict, exact: bool, stack: ExitStack):
        config = config.copy_and_resolve_references()
        config.rollout.exact, config.rollout.dtype, config.train.pack = exact, config.policy.dtype, False
        self.probe = probe = stack.enter_context(Probe(config))
        setup = probe.setup
        if setup.needs_exact:
            raise UserError(f"loss {config.loss.name!r} needs exact divergences, which are not counted; take another")
        update = setup.update_with(counting(setup.loss), setup.weights, setup.optimizer, setup.needed)
        self._update = jit_update(update, setup.shardings, setup.mesh)
        self._state = probe.state()
        self.tokens, self.differ, self.largest = 0, 0, 0.0
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """Draws a batch, counts, and trains on its last minibatch."""
        params = self._state.params
        began = time.perf_counter()
        jax.block_until_ready(self.probe.generate(params, number))
        self.seconds.append(time.perf_counter() - began)
        batch, lengths, prompts = self.probe.draw(params, number)
        first_epoch = self.probe.config.train.minibatches
        after: Any = None
        for index, _ in zip(self.probe.setup.minibatches(number), range(first_epoch), strict=False):
            state = jax.tree.map(jnp.copy, self._state)  # the update takes it
            after, measured = self._update(state, batch, self.probe.plan(index, lengths, prompts))
            differ, tokens = measured.sums["loss/differ"]
            self.differ, self.tokens = self.differ + int(differ), self.tokens + int(tokens)
            self.largest = max(self.largest, float(measured.maxima["policy/abs_prob_diff_max"]))
        self._state = after

    def summary(self) -> str:
        """One line."""
        return (
            f"rollout.exact={self.probe.config.rollout.exact}: {self.differ:,} of {self.tokens:,} tokens differ, the "
            f"largest |π − μ| is {self.largest:.3g}"
        )


def compare(config: ConfigDict, tokens: int) -> tuple[Side, Side]:
    """The config's usual rollouts and its exact ones, each on at least so many tokens."""
    with ExitStack() as stack:
        sides = Side(config, False, stack), Side(config, True, stack)
        number = 0
        while min(side.tokens for side in sides) < tokens:
            for side in sides:
                side.step(number)
            number += 1
    return sides


def ratio(sides: tuple[Side, Side]) -> float:
    """The time of an exact rollout over that of a usual one, medians without the first, which compiles."""
    usual, exact = (float(np.median(side.seconds[1:] or side.seconds)) for side in sides)
    return exact / usual


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {"--tokens": dict(type=cli.whole(1, 10**9), default=100_000, help="to compare, at least (100000)")},
    )
    sides = compare(config, arguments.tokens)
    for side in sides:
        print(side.summary())
    print(f"an exact rollout takes {ratio(sides):.1f} times as long")


if __name__ == "__main__":
    run_main(main)
