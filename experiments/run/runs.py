"""One run, or several of one shape that are trained together.

The arrays of several runs are stacked along a first axis, [S, ...]. Of a single run nothing is stacked, so that what is
compiled, saved and laid out over a mesh is the run itself.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.errors import lookup
from dppo_jax.losses.core import BoundLoss
from dppo_jax.types import ExactDivergence, LossInputs, LossOutput, SlopeSums, TopKPair
from experiments.run.setup import Setup


def _in_turns(function: Callable) -> Callable:
    """vmap's meaning, one run after another."""
    return lambda *arguments: jax.lax.map(lambda arguments_of_run: function(*arguments_of_run), arguments)


# How a function of one run becomes one of several. On a CPU, runs in turns are faster than runs at once: a batched
# while loop copies its whole state every step, and there are no lanes to fill.
OVER = {"vmap": jax.vmap, "map": _in_turns}


class Runs:
    """`setups` of the runs. `base` is what is compiled: the one run's own setup or, of stacked runs, one from which
    they differ in the seed, a factor of the learning rate, and what `different` or the host takes from each: the loss,
    aggregation, advantage, the reward's terms, resampling, which responses are left out. `over`: vmap, map, or auto
    (map on a CPU, else vmap)."""

    def __init__(self, setups: Sequence[Setup], over: str = "auto", *, base: Setup | None = None):
        if over == "auto":
            over = "map" if jax.default_backend() == "cpu" else "vmap"
        self.setups, self.stacked = tuple(setups), base is not None
        self.base = setups[0] if base is None else base
        self._over = lookup(OVER, over, "--over")

    @cached_property
    def needed(self) -> frozenset[str]:
        """The optional fields of LossInputs that the loss of any run asks for."""
        return frozenset().union(*(setup.needed for setup in self.setups))

    @property
    def needs_exact(self) -> bool:
        """Whether updates take the behavior policy's parameters, for exact divergences."""
        return "exact" in self.needed

    @property
    def topk(self) -> int:
        """K of the rollout, for all."""
        return self.base.config.rollout.tracked if "topk" in self.needed else 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the rollout records the behavior policy's entropy, for all."""
        return "behavior_entropy" in self.needed

    def __len__(self) -> int:
        return len(self.setups)

    def together(self, trees: Sequence[Any]) -> Any:
        """One tree for all runs, from one for each."""
        if not self.stacked:
            return trees[0]
        stack = jnp.stack if isinstance(jax.tree.leaves(trees[0])[0], jax.Array) else np.stack
        return jax.tree.map(lambda *leaves: stack(leaves), *trees)

    def apart(self, tree: Any) -> list[Any]:
        """One tree for each run, from one for all."""
        if not self.stacked:
            return [tree]
        return [self.alone(tree, number) for number in range(len(self))]

    def alone(self, tree: Any, number: int) -> Any:
        """The tree of one run, from one for all."""
        return jax.tree.map(lambda leaf: leaf[number], tree) if self.stacked else tree

    def different(self, key: Callable[[Setup], Hashable]) -> tuple[list[Setup], jax.Array]:
        """Of every value of `key` the first setup that has it, and of every run which of these is like its own,
        i32[S]: the branches and the index of a `lax.switch`."""
        firsts: dict[Hashable, Setup] = {}
        for setup in self.setups:
            firsts.setdefault(key(setup), setup)
        order = list(firsts)
        return list(firsts.values()), jnp.asarray([order.index(key(setup)) for setup in self.setups], jnp.int32)

    def own_metrics(self, scalars: dict[str, float], number: int) -> dict[str, float]:
        """Without what other losses than this run's measure."""
        if not self.stacked:
            return scalars
        names = self._loss_metrics[number]
        foreign = set().union(*self._loss_metrics) - names
        return {tag: value for tag, value in scalars.items() if tag.removeprefix("loss/") not in foreign}

    @cached_property
    def _loss_metrics(self) -> list[set[str]]:
        """The names of every run's own loss metrics."""
        return [metric_names(setup.loss) for setup in self.setups]

    def each(self, function: Callable) -> Callable:
        """A function of one run, as one of all: for large ones, with loops."""
        return self._over(function) if self.stacked else function

    def at_once(self, function: Callable) -> Callable:
        """The same for small ones."""
        return jax.vmap(function) if self.stacked else function


def metric_names(loss: BoundLoss) -> set[str]:
    """What a loss measures, beside what is measured of all."""
    return set(jax.eval_shape(loss, EVERY_FIELD).metrics)


def with_all_metrics(losses: Sequence[BoundLoss]) -> list[BoundLoss]:
    """The losses, each with the metrics of all, since the branches of `lax.switch` must return one structure. A metric
    that is not the loss's own counts nowhere."""
    names = sorted(set().union(*map(metric_names, losses)))

    def padded(loss: BoundLoss) -> BoundLoss:
        def with_all(inputs: LossInputs) -> LossOutput:
            output = loss(inputs)
            uncounted = jnp.zeros_like(inputs.logp), jnp.zeros_like(inputs.mask)
            return dataclasses.replace(output, metrics={name: output.metrics.get(name, uncounted) for name in names})

        return with_all

    return [padded(loss) for loss in losses]


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


# One token of one response, with whatever a loss may ask for.
EVERY_FIELD = LossInputs(
    logp=_shape(1, 1),
    behavior_logp=_shape(1, 1),
    advantages=_shape(1, 1),
    mask=_shape(1, 1, dtype=bool),
    segments=_shape(1, 1, dtype=jnp.int32),
    proximal_logp=_shape(1, 1),
    reference_logp=_shape(1, 1),
    teacher_logp=_shape(1, 1),
    behavior_entropy=_shape(1, 1),
    topk=TopKPair(
        _shape(1, 1, 1), _shape(1, 1, 1), _shape(1, 1, dtype=bool), _shape(1, 1, 1), _shape(1, 1, dtype=jnp.int32)
    ),
    exact=ExactDivergence(_shape(1, 1), _shape(1, 1), SlopeSums(*[_shape(1, 1)] * 4)),
)
