"""Predictive masks: the sign of their slope against float64 finite differences, and what must hold of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.divergences import topk_slope_sums
from dppo_jax.errors import UserError
from dppo_jax.losses import LossInputs, TopKPair, bind_loss
from dppo_jax.token_head import exact_divergence

STATES, V, K = 2000, 300, 20


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def tv(mu: np.ndarray, pi: np.ndarray) -> np.ndarray:
    return 0.5 * np.abs(np.exp(pi) - np.exp(mu)).sum(-1)


def kl(mu: np.ndarray, pi: np.ndarray) -> np.ndarray:
    return (np.exp(mu) * (mu - pi)).sum(-1)


DIVERGENCES = {"tv": tv, "kl": kl}


@functools.cache
def states() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log mu, log pi, a token drawn from mu) of every state."""
    rng = np.random.RandomState(0)
    z = 2.5 * rng.standard_normal((STATES, V))
    mu, pi = log_softmax(z), log_softmax(z + 0.4 * rng.standard_normal(z.shape))
    tokens = (mu + rng.gumbel(size=mu.shape)).argmax(-1)
    return mu, pi, tokens


@functools.cache
def grows(kind: str) -> np.ndarray:
    """Whether the divergence does, in float64, when the logits take a small step along the gradient of log pi(a)."""
    mu, pi, tokens = states()
    step = 1e-6 * (np.eye(V)[tokens] - np.exp(pi))
    ahead, behind = (DIVERGENCES[kind](mu, log_softmax(pi + way * step)) for way in (1, -1))
    assert (ahead != behind).all()
    return ahead > behind


def pick(x: np.ndarray, tokens: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(np.take_along_axis(x, tokens[:, None], axis=-1), jnp.float32)


def inputs_of(mu, pi, tokens, k: int, exact: bool = False) -> LossInputs:
    """One token a row, all of advantage 1, with the k likeliest tokens under mu."""
    ids = np.argsort(-mu, axis=-1)[:, :k]
    has_sampled = jnp.asarray((ids == tokens[:, None]).any(-1, keepdims=True))
    tracked = (jnp.asarray(np.take_along_axis(x, ids, axis=-1)[:, None], jnp.float32) for x in (pi, mu))
    one = jnp.ones(has_sampled.shape)
    outside = mu.shape[-1] - k - ~has_sampled
    found = None
    if exact:
        logits = (jnp.asarray(x[:, None], jnp.float32) for x in (pi, mu))
        pi_logits, mu_logits = logits
        eye = jnp.eye(mu.shape[-1])
        found = exact_divergence(pi_logits, eye, mu_logits, eye, jnp.asarray(tokens[:, None], jnp.int32))
    return LossInputs(
        logp=pick(pi, tokens), behavior_logp=pick(mu, tokens), advantages=one, mask=one > 0,
        topk=TopKPair(*tracked, has_sampled, outside=outside), exact=found,
    )  # fmt: skip


def masked(name: str, inputs: LossInputs, **more) -> np.ndarray:
    """At threshold 0 and A = 1: where the loss predicts that the divergence grows."""
    loss = bind_loss(name, dict(delta_low=0.0, delta_high=0.0, ratio_cap=5.0, **more))
    return ~np.asarray(jax.jit(loss)(inputs).keep)[:, 0]


@functools.cache
def right(name: str, **more) -> float:
    """The share of the states in which it predicts what the divergence does."""
    predicted = masked(name, inputs_of(*states(), K, exact="exact" in name), **more)
    return float((predicted == grows(name[-2:])).mean())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_exact_slope_has_the_sign_of_finite_differences(kind):
    assert right(f"pdm_exact_{kind}") >= 0.999


def test_the_uniform_tail_is_right_nearly_always():
    """For KL in 99% of the states. A bucket cannot know the signs within it, so TV reaches less."""
    assert right("pdm_topk_kl", tail="uniform") >= 0.99
    assert right("pdm_topk_tv", tail="uniform") >= 0.95


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_either_slope_is_right_more_often_than_the_ratio_is_and_the_uniform_tail_most_often(kind):
    uniform, aggregated = (right(f"pdm_topk_{kind}", tail=tail) for tail in ("uniform", "aggregated"))
    assert uniform > aggregated > right(f"dppo_topk_{kind}")


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_all_tokens_but_one_tracked_is_exact(kind):
    """The rest is then one token, whose tail both estimates know."""
    states_of_few = tuple(x[:500, ..., :12] if x.ndim > 1 else x[:500] % 12 for x in states())
    mu, pi = (log_softmax(x) for x in states_of_few[:2])
    inputs = inputs_of(mu, pi, states_of_few[2], 11, exact=True)
    want = masked(f"pdm_exact_{kind}", inputs)
    for tail in ("uniform", "aggregated"):
        assert (masked(f"pdm_topk_{kind}", inputs, tail=tail) == want).mean() > 0.99
    assert 0.1 < want.mean() < 0.9


def test_of_two_events_the_slope_has_the_ratios_direction():
    """The sampled token and all others: today's rule."""
    mu, pi, _ = states()
    inputs = inputs_of(mu, pi, mu.argmax(-1), 1)
    for kind in DIVERGENCES:
        want = masked(f"dppo_topk_{kind}", inputs)
        for tail in ("uniform", "aggregated"):
            np.testing.assert_array_equal(masked(f"pdm_topk_{kind}", inputs, tail=tail), want)


def test_the_sampled_token_is_counted_once_wherever_it_stands():
    """Among the K, or beside them: the others' sums are the same."""
    mu, pi, _ = states()
    ids = np.argsort(-mu, axis=-1)
    among, beside = inputs_of(mu, pi, ids[:, 4], 5), inputs_of(mu, pi, ids[:, 4], 4)
    assert among.topk.has_sampled.all() and not beside.topk.has_sampled.any()
    np.testing.assert_array_equal(among.topk.outside, beside.topk.outside)
    sums = [topk_slope_sums(x.logp, x.behavior_logp, x.topk, x.topk.outside) for x in (among, beside)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *sums)


@pytest.mark.parametrize("name", ["pdm_topk_tv", "pdm_topk_kl", "pdm_exact_tv", "pdm_exact_kl"])
def test_what_differs_from_dppo_is_measured_where_the_advantage_is_not_0(name):
    inputs = inputs_of(*states(), K, exact=True)
    advantages = jnp.asarray(np.random.RandomState(1).randint(-1, 2, (STATES, 1)), jnp.float32)
    inputs = inputs.replace(advantages=advantages)
    numbers = dict(delta_low=0.15, delta_high=0.12, ratio_cap=5.0)
    more = {"tail": "uniform"} if "topk" in name else {}
    out = bind_loss(name, numbers | more)(inputs)
    dppo = bind_loss(name.replace("pdm", "dppo"), numbers)(inputs)
    mask_differs, where = out.metrics["pdm/mask_differs"]
    turned, where_turned = out.metrics["pdm/direction_differs"]
    np.testing.assert_array_equal(where, advantages != 0)
    np.testing.assert_array_equal(where_turned, where)
    np.testing.assert_array_equal(mask_differs, out.keep != dppo.keep)
    np.testing.assert_array_equal(out.metrics["divergence"][0], dppo.metrics["divergence"][0])
    up = masked(name, inputs.replace(advantages=jnp.ones_like(advantages)), **more)
    np.testing.assert_array_equal(np.asarray(turned)[:, 0], up != np.asarray(inputs.logp > inputs.behavior_logp)[:, 0])
    assert np.asarray(mask_differs).any() and not (np.asarray(mask_differs) > np.asarray(turned)).any()


@pytest.mark.parametrize("tail, said", [
    ("unifrom", "^unknown loss.tail 'unifrom'; the nearest is 'uniform'$"),
    (1.0, "^loss.tail must be text, not 1.0; known: aggregated, uniform$"),
])  # fmt: skip
def test_another_tail_is_refused(tail, said):
    with pytest.raises(UserError, match=said):
        bind_loss("pdm_topk_kl", dict(delta_low=0.05, delta_high=0.05, ratio_cap=5.0, tail=tail))


def test_a_uniform_tail_needs_the_number_of_its_tokens_and_an_aggregated_one_does_not():
    inputs = inputs_of(*(x[:3] for x in states()), K)
    inputs = inputs.replace(topk=inputs.topk.replace(outside=None))
    masked("pdm_topk_kl", inputs, tail="aggregated")
    with pytest.raises(UserError, match=r"^this loss needs LossInputs\.topk\.outside, which is None"):
        masked("pdm_topk_kl", inputs, tail="uniform")
