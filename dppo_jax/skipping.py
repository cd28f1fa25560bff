"""An optimizer step that is taken whole, or not at all where a number of it is not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from optax import ScaleByScheduleState

from dppo_jax.metrics import Metrics

FAULTS = ("loss", "gradient")  # what may not be finite, in the order of the histogram "not_finite"


def taken_if_finite(
    before: Any, after: Any, measured: Metrics, *, loss: Array, norm: Array, tag: str = "update/skipped"
) -> tuple[Any, Metrics]:
    """(`after`, its metrics), two TrainStates, or `before` to the bit where loss or gradient norm is not finite.

    New parameters are not looked at, which would take a copy of them: from finite ones, a norm that float32 holds makes
    finite ones. Those that are too large to be of use make the next loss not finite, and are not saved.

    Two counters go on in either case, so that a skipped update is one that moved nothing: the state's `updates`, and
    that of the learning rate's schedule. Adam's own does not, since it belongs to the moments. The metrics of a skipped
    update count nothing, and `tag` counts it.
    """
    sound = jnp.stack([jnp.isfinite(loss), jnp.isfinite(norm)])
    taken = jnp.all(sound)

    def chosen(new: Any, old: Any) -> Any:
        return new if isinstance(new, ScaleByScheduleState) else jnp.where(taken, new, old)

    state = dataclasses.replace(
        after,
        params=jax.tree.map(chosen, after.params, before.params),
        opt_state=jax.tree.map(
            chosen, after.opt_state, before.opt_state, is_leaf=lambda x: isinstance(x, ScaleByScheduleState)
        ),
    )
    measured = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), measured)
    skipped = 1.0 - taken.astype(jnp.float32), jnp.float32(0.0)
    return state, dataclasses.replace(
        measured,
        sums=measured.sums | {tag: skipped},
        histograms=measured.histograms | {f"not_finite/{tag}": 1.0 - sound.astype(jnp.float32)},
    )
