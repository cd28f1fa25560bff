"""A small state of a run: what is saved, damaged and compared."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def state(step: int, *, ahead: bool = True) -> dict[str, Any]:
    """What a run saves: nested, of several dtypes, with lists; no two steps agree in a leaf."""
    draw = np.random.default_rng(step).normal
    params = {"embed": jnp.asarray(draw(size=(64, 16)), jnp.float32), "norm": jnp.asarray(draw(size=16), jnp.bfloat16)}
    moments = [{"mu": jax.tree.map(lambda x: x + 1, params)}, jnp.int32(step + 7)]
    found = {"params": params, "opt_state": moments, "updates": jnp.int32(step)}
    found["past"] = [params, jax.tree.map(lambda x: 2 * x, params)]
    if ahead:
        found["ahead"] = {"tokens": jnp.asarray(np.arange(24).reshape(4, 6) + step, jnp.int32)}
    return found


def abstract(step: int = 0, **kind: bool) -> Any:
    """What `state` looks like."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(step, **kind))
