"""What losses are made of: the coefficient's form, masks by sign, sums over sequences, and the objective."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from dppo_jax.divergences import LOG_MIN
from dppo_jax.errors import UserError
from dppo_jax.types import LossInputs, LossOutput

Loss = Callable[..., LossOutput]
BoundLoss = Callable[[LossInputs], LossOutput]

# Keeps exp(log r), and the squared norm of a gradient that holds it, finite in float32. Masks never see it.
LOG_RATIO_LIMIT = 40.0


class Bound(functools.partial):
    """A loss with its hyperparameters, equal to any other of the same function and numbers."""

    def __hash__(self) -> int:
        return hash((self.func, self.args, frozenset(self.keywords.items())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bound):
            return False
        return (self.func, self.args, self.keywords) == (other.func, other.args, other.keywords)


class MissingField(UserError):
    """A loss asked for an optional field that the batch lacks."""

    def __init__(self, field: str):
        super().__init__(f"this loss needs LossInputs.{field}, which is None")
        self.field = field


def require(inputs: LossInputs, field: str) -> Array:
    """inputs.<field> (dots reach into it), or MissingField, of what is None on the way."""
    value, path = inputs, field.split(".")
    for count, name in enumerate(path, start=1):
        value = getattr(value, name)
        if value is None:
            raise MissingField(".".join(path[:count]))
    return value  # type: ignore[return-value]


def zero_outside_mask(inputs: LossInputs) -> LossInputs:
    """The inputs with 0 for every value outside the mask, so that a NaN there reaches no arithmetic."""
    mask = inputs.mask

    def clean(x):
        if x.dtype == bool:
            return x
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, jnp.zeros((), x.dtype))

    return jax.lax.stop_gradient(jax.tree.map(clean, inputs))


def log_ratio(logp: Array, anchor_logp: Array) -> Array:
    """log(pi/anchor), finite at probability 0."""
    return jnp.maximum(logp, -LOG_MIN) - jnp.maximum(anchor_logp, -LOG_MIN)


def bounded_exp(x: Array) -> Array:
    """exp(x), its argument held at LOG_RATIO_LIMIT: for weights, never for masks."""
    return jnp.exp(jnp.minimum(x, LOG_RATIO_LIMIT))


def output(
    inputs: LossInputs, weight: Array, keep: Array | None = None, *, extra: Array | float = 0.0, metrics=None
) -> LossOutput:
    """c = keep * weight * A + extra inside the mask, 0 outside; no gradient flows through it."""
    inside = inputs.mask if keep is None else inputs.mask & keep
    coef = jnp.where(inside, weight * inputs.advantages, 0.0) + jnp.where(inputs.mask, extra, 0.0)
    return LossOutput(coef=jax.lax.stop_gradient(coef), keep=inside, metrics={} if metrics is None else metrics)


def from_keep(inputs: LossInputs, keep: Array, *, ratio_cap: float, metrics: dict | None = None) -> LossOutput:
    """c = keep * min(r, ratio_cap) * A inside the mask, 0 outside."""
    ratio = bounded_exp(log_ratio(inputs.logp, inputs.behavior_logp))
    return output(inputs, jnp.minimum(ratio, ratio_cap), keep, metrics=metrics)


def two_sided(advantages: Array, high: Array, low: Array) -> Bool[Array, "M Q"]:
    """The mask that drops `high` where A > 0 and `low` where A < 0."""
    return ~jnp.where(advantages > 0, high, (advantages < 0) & low)


class Sequences:
    """Sums over the tokens of each response, where a row may hold several: `inputs.segments` tells them apart.

    Works on each row sorted by sequence, masked-out positions last. Values outside the mask must be finite.
    """

    def __init__(self, inputs: LossInputs):
        mask = inputs.mask
        segments = jnp.ones(mask.shape, jnp.int32) if inputs.segments is None else inputs.segments
        self._mask, self._key = mask, jnp.where(mask, segments, jnp.iinfo(jnp.int32).max)
        self._order = jnp.argsort(self._key, axis=1, stable=True)
        key, self._inside = self._sorted(self._key), self._sorted(mask)
        starts = jnp.concatenate([jnp.ones_like(mask[:, :1]), key[:, 1:] != key[:, :-1]], axis=1)
        self._starts = starts
        self._run = jnp.cumsum(starts, axis=1) - 1  # which sequence of the row, from 0
        column = jnp.arange(mask.shape[1])
        self._start = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)  # where it begins

    def _sorted(self, x: Array) -> Array:
        return jnp.take_along_axis(x, self._order, axis=1)

    def _back(self, x: Array) -> Array:
        return jnp.put_along_axis(jnp.zeros_like(x), self._order, x, axis=1, inplace=False)

    def _reduce(self, x: Array, reduce: Callable[..., Array]) -> Array:
        """One number a sequence, at each of its positions, in sorted order."""
        count = x.shape[1]
        one = jax.vmap(lambda x, run: reduce(x, run, count, indices_are_sorted=True)[run])
        return one(x, self._run)

    def _running(self, x: Array, combine: Callable[[Array, Array], Array]) -> Array:
        """combine(x_1, ..., x_t) of the positions of each sequence, in sorted order."""

        def step(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
            return a[0] | b[0], jnp.where(b[0], b[1], combine(a[1], b[1]))

        return jax.lax.associative_scan(step, (self._starts, x), axis=1)[1]

    def _sum(self, x: Array) -> Array:
        return self._reduce(jnp.where(self._inside, x, 0), jax.ops.segment_sum)

    def sum(self, x: Float32[Array, "M Q"]) -> Float32[Array, "M Q"]:
        """Of the masked positions of each sequence, at each of them."""
        return self._back(self._sum(self._sorted(x)))

    def mean(self, x: Float32[Array, "M Q"]) -> Float32[Array, "M Q"]:
        """As `sum`, over the sequence's length; 0 outside the mask."""
        return self.sum(x) / jnp.maximum(self.length(), 1)

    def max(self, x: Float32[Array, "M Q"]) -> Float32[Array, "M Q"]:
        """As `sum`."""
        return self._back(self._reduce(self._sorted(x), jax.ops.segment_max))

    def length(self) -> Int32[Array, "M Q"]:
        """T, at each of the sequence's positions."""
        return self.sum(self._mask.astype(jnp.int32))

    def position(self) -> Int32[Array, "M Q"]:
        """t - 1: how many of the sequence's masked positions come before."""
        return self._back(jnp.arange(self._mask.shape[1]) - self._start)

    def before(self, x: Float32[Array, "M Q"]) -> Float32[Array, "M Q"]:
        """The sum over the sequence's earlier positions."""
        x = jnp.where(self._inside, self._sorted(x), 0.0)
        total = jnp.cumsum(x, axis=1) - x
        return self._back(total - jnp.take_along_axis(total, self._start, axis=1))

    def least_before(self, x: Float32[Array, "M Q"]) -> Float32[Array, "M Q"]:
        """The least of the sequence's earlier positions; inf where there are none."""
        least = self._running(self._sorted(x), jnp.minimum)
        earlier = jnp.concatenate([jnp.full_like(x[:, :1], jnp.inf), least[:, :-1]], axis=1)
        return self._back(jnp.where(self._starts, jnp.inf, earlier))

    def mean_up_to(self, x: Float32[Array, "M Q"], among: Bool[Array, "M Q"]) -> Float32[Array, "M Q"]:
        """At each position, the mean of the x that are no greater, over the sequence's positions `among`; 0 of none.

        Of equal x, those in earlier columns count as smaller.
        """
        order = jax.vmap(lambda x, key: jnp.lexsort((x, key)))(x, self._key)
        x, among = (jnp.take_along_axis(a, order, axis=1) for a in (jnp.where(among, x, 0.0), among))
        total, count = (self._running(a, jnp.add) for a in (x, among.astype(x.dtype)))
        return jnp.put_along_axis(jnp.zeros_like(x), order, total / jnp.maximum(count, 1), axis=1, inplace=False)

    def quantile(self, x: Float32[Array, "M Q"], q: float) -> Float32[Array, "M Q"]:
        """The q-quantile of each sequence, interpolated linearly between its values."""
        by_value = jax.vmap(lambda x, key: x[jnp.lexsort((x, key))])(x, self._key)
        rank = q * (self._sum(jnp.ones_like(by_value)) - 1)
        low = jnp.floor(rank)
        at = jnp.clip(self._start + jnp.stack([low, jnp.ceil(rank)]).astype(jnp.int32), 0, x.shape[1] - 1)
        lower, upper = (jnp.take_along_axis(by_value, i, axis=1) for i in at)
        return self._back(lower + (rank - low) * (upper - lower))


def policy_objective(
    coef: Float32[Array, "M Q"], weights: Float32[Array, "M Q"], logp: Float32[Array, "M Q"], mask: Bool[Array, "M Q"]
) -> Float32[Array, ""]:
    """The scalar to minimise, -sum w c log pi. Its gradient is that of the objective; not its value."""
    scale = jax.lax.stop_gradient(jnp.where(mask, weights * coef, 0.0))
    return -jnp.sum(scale * jnp.where(mask, jnp.maximum(logp, -LOG_MIN), 0.0))
