"""Products with the weights of linear layers, laid out as XLA wants them on each platform."""

import functools

import jax
from jaxtyping import Array, Float

from dppo_jax.devices.sharding import constrain, cuts_evenly, is_cut, summed_product


def linear(
    x: Float[Array, "B T *I"], w: Float[Array, "I O"], axes: tuple[str, str], heads: int | None = None
) -> Float[Array, "B T *O"]:
    """x w, for a weight with these logical axes, whose "embed" axis is gathered first.

    x is [B, T, I], or [B, T, H, D] with H D = I. The result is [B, T, O], or [B, T, heads, O / heads] with `heads`.
    """
    inner = x.shape[2] if x.ndim == 4 else None
    even = [n is None or cuts_evenly(n, axis) for n, axis in zip((inner, heads), axes, strict=True)]
    if x.shape[1] > 1 and all(even):
        return _linear(x, w, axes, heads)
    # A decode step has fewer values in x than in w: reshaping the result avoids a new layout of the weight.
    y = _linear(x.reshape(*x.shape[:2], -1), w, axes, None)
    return y if heads is None else y.reshape(*y.shape[:2], heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x: Array, w: Array, axes: tuple[str, str], heads: int | None) -> Array:
    """`linear`. The weight is split into heads in place of what it makes: XLA for TPUs lays either out anew.

    Its backward pass says x^T g for the weight's gradient, where JAX says (g^T x)^T: XLA's CPU backend copies what it
    transposes, and x is already at hand in the layout that it wants (1.2 x a layer's training).
    """
    return _linear_forward(x, w, axes, heads)[0]


def _gathered(w: Array, axes: tuple[str, str], inner: tuple[int, ...], heads: int | None) -> Array:
    """w [*I, *O], whole along the residual side."""
    return constrain(w, *_uncut(axes)).reshape(*inner, *((w.shape[1],) if heads is None else (heads, -1)))


def _uncut(axes: tuple[str, ...]) -> tuple[str | None, ...]:
    return tuple(None if axis == "embed" else axis for axis in axes)


def _linear_forward(x: Array, w: Array, axes: tuple[str, str], heads: int | None):
    gathered = _gathered(w, axes, x.shape[2:], heads)
    inner = tuple(range(2, x.ndim)), tuple(range(x.ndim - 2))
    return jax.lax.dot_general(x, gathered, (inner, ((), ()))), (x, w)


def _linear_backward(axes: tuple[str, str], heads: int | None, residuals: tuple[Array, Array], g: Array):
    x, w = residuals
    gathered = _gathered(w, axes, x.shape[2:], heads)
    outer = tuple(range(2, g.ndim)), tuple(range(x.ndim - 2, gathered.ndim))
    d_x = jax.lax.dot_general(g, gathered, (outer, ((), ())))
    if is_cut("embed") and "embed" in axes:
        if axes[0] == "embed":
            return d_x, summed_product(x, g, axes[1]).reshape(w.shape)
        return d_x, summed_product(g, x, axes[0]).reshape(w.shape[::-1]).T
    d_w = jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ()))).reshape(w.shape)
    return d_x, constrain(d_w, *axes)


_linear.defvjp(_linear_forward, _linear_backward)
