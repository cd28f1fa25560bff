"""Which tokens are outside a loss's region before any update, where both policies have the same parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dppo_jax.divergences import sampled_in_topk
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES, required_fields
from dppo_jax.losses.core import BoundLoss
from dppo_jax.types import ExactDivergence, LossInputs, SlopeSums, TopKPair, TrainBatch
from experiments.probe import Measured
from experiments.run.setup import Setup
from experiments.sweep import Run, config_of


class Region(NamedTuple):
    """Of a loss, before any update."""

    outside: float  # share of the tokens with A != 0
    recomputed: bool  # it lies around the recomputed policy, or is corrected by it


class Regions(NamedTuple):
    """Of the losses of the table."""

    tokens: int  # with A != 0
    by_loss: dict[str, Region]  # of those that have a region
    without: tuple[str, ...]  # losses that keep every token
    left_out: dict[str, str]  # losses that one batch cannot tell of -> why, in a sentence


def bound(config: ConfigDict, name: str) -> BoundLoss:
    """The loss of that name with the config's numbers for it. UserError where nothing sets one."""
    return Setup(config_of(config, Run(name, config.seed, 1.0))).loss


def inputs_at_rollout(batch: TrainBatch, seen: Measured) -> LossInputs:
    """What a loss sees of a batch before any update: the recomputed policy and the first one are the policy itself."""
    logp, topk = jnp.asarray(seen.logp), None
    if batch.topk_ids is not None:
        assert seen.topk_logp is not None
        has_sampled = sampled_in_topk(batch.tokens, batch.topk_ids)
        tracked = batch.topk_ids.shape[-1]
        topk = TopKPair(
            logp=jnp.asarray(seen.topk_logp),
            behavior_logp=batch.topk_behavior_logp,
            has_sampled=has_sampled,
            proximal_logp=jnp.asarray(seen.topk_logp),
            outside=None if seen.vocabulary is None else seen.vocabulary - tracked - ~has_sampled,
        )
    per_token = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    return LossInputs(
        logp=logp,
        behavior_logp=batch.behavior_logp,
        advantages=jnp.broadcast_to(per_token, logp.shape),
        mask=batch.mask,
        segments=jnp.broadcast_to(jnp.arange(1, len(logp) + 1)[:, None], logp.shape),
        proximal_logp=logp,
        reference_logp=logp,
        behavior_entropy=batch.behavior_entropy,
        topk=topk,
        exact=ExactDivergence(tv=jnp.asarray(seen.tv), kl=jnp.asarray(seen.kl), slope=seen.slope),
    )


def has_advantage(inputs: LossInputs) -> np.ndarray:
    """The tokens with A != 0, bool[B, R]."""
    return np.asarray(inputs.mask) & (np.asarray(inputs.advantages) != 0)


def measure(config: ConfigDict, inputs: LossInputs, names: Sequence[str] = ()) -> Regions:
    """The share of tokens outside each loss's region, of tokens with A != 0; see `inputs_at_rollout`. `names`: of the
    losses (none: the whole table)."""
    losses, left_out = {}, {}
    for name in names or LOSSES:
        try:
            losses[name] = bound(config, name)
            jax.eval_shape(losses[name], inputs)
        except UserError as error:
            left_out[name] = str(error).split(" (")[0]
    losses = {name: loss for name, loss in losses.items() if name not in left_out}
    keep = jax.jit(lambda inputs: {name: loss(inputs).keep for name, loss in losses.items()})
    extremes, counted = _extremes(inputs), has_advantage(inputs)
    far, here, count = keep(extremes), keep(inputs), int(counted.sum())
    without = tuple(name for name in losses if bool(jnp.all(far[name] == extremes.mask)))
    by_loss = {
        name: Region(float((~np.asarray(here[name]) & counted).sum() / max(count, 1)), _recomputed(loss))
        for name, loss in losses.items()
        if name not in without
    }
    return Regions(count, by_loss, without, left_out)


def _recomputed(loss: Callable) -> bool:
    return "proximal_logp" in required_fields(loss, ("proximal_logp",))


def _extremes(inputs: LossInputs) -> LossInputs:
    """Responses of one token that no region holds, in shapes as given: in even rows it rose to near 1 with A > 0, in
    odd rows it fell from there with A < 0."""
    near, far = -0.01, -9.0
    rose = jnp.broadcast_to(jnp.arange(len(inputs.logp))[:, None] % 2 == 0, inputs.logp.shape)
    logp, anchor = jnp.where(rose, near, far), jnp.where(rose, far, near)

    topk = None
    if inputs.topk is not None:  # of the K likeliest the first is the sampled token, and the only likely one
        first = jnp.arange(inputs.topk.logp.shape[-1]) == 0
        pi, mu = (jnp.where(first, x[..., None], -30.0) for x in (logp, anchor))
        topk = TopKPair(pi, mu, jnp.ones_like(rose), mu, jnp.ones(rose.shape, jnp.int32))
    rest, rest_anchor = -jnp.expm1(logp), -jnp.expm1(anchor)  # the other tokens, taken for one
    sign = jnp.sign(rest - rest_anchor)
    slope = SlopeSums(rest * (rest_anchor - rest), rest**2, sign * rest, sign * rest**2)
    return dataclasses.replace(
        inputs,
        logp=logp,
        behavior_logp=anchor,
        advantages=jnp.where(rose, 1.0, -1.0),
        mask=jnp.broadcast_to(jnp.arange(logp.shape[1]) == 0, logp.shape),
        proximal_logp=anchor,
        reference_logp=anchor,
        behavior_entropy=None if inputs.behavior_entropy is None else jnp.zeros_like(logp),
        topk=topk,
        exact=ExactDivergence(tv=jnp.ones_like(logp), kl=jnp.full_like(logp, -far), slope=slope),
    )


if __name__ == "__main__":
    raise SystemExit("error: experiments.regions is no command; the questions in experiments/questions use it")
