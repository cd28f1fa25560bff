"""Divergences against float64, their mathematical properties, and their behaviour where float32 is thin."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.divergences import binary_kl, binary_tv, topk_kl, topk_tv
from dppo_jax.types import TopKPair
from tests.helpers.places import GOLDEN

LOSSES_FILE = GOLDEN / "losses" / "losses.npz"
CASES = [("k1", "jit"), ("k3", "jit"), ("k3", "eager"), ("k20", "jit"), ("ties", "jit")]
RUN = {"eager": lambda f: f, "jit": jax.jit}
BINARY = {"tv": binary_tv, "kl": binary_kl}
TOPK = {"tv": topk_tv, "kl": topk_kl}
PROPERTY = settings(max_examples=40, derandomize=True, deadline=None)
V = 12
logits = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V)


def log_softmax(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def exact(log_anchor: np.ndarray, log_policy: np.ndarray) -> dict[str, float]:
    a, p = np.exp(log_anchor), np.exp(log_policy)
    return {"tv": 0.5 * np.abs(a - p).sum(), "kl": (a * (log_anchor - log_policy)).sum()}


def pair(logp, behavior_logp, has_sampled, proximal_logp=None) -> TopKPair:
    return TopKPair(
        logp=jnp.asarray(logp, jnp.float32),
        behavior_logp=jnp.asarray(behavior_logp, jnp.float32),
        has_sampled=jnp.asarray(has_sampled),
        proximal_logp=None if proximal_logp is None else jnp.asarray(proximal_logp, jnp.float32),
    )


COMPILED = {f: jax.jit(f) for f in (binary_tv, binary_kl, topk_tv, topk_kl)}


def binary_of(log_anchor, log_policy, token) -> dict[str, float]:
    at = [jnp.full((1, 1), x[token], jnp.float32) for x in (log_policy, log_anchor)]
    return {name: float(COMPILED[f](*at)[0, 0]) for name, f in BINARY.items()}


def topk_of(log_anchor, log_policy, token, k) -> dict[str, float]:
    ids = np.argsort(-log_anchor, kind="stable")[:k]
    at = [jnp.full((1, 1), x[token], jnp.float32) for x in (log_policy, log_anchor)]
    tracked = pair(log_policy[ids][None, None], log_anchor[ids][None, None], np.full((1, 1), token in ids))
    return {name: float(COMPILED[f](*at, tracked)[0, 0]) for name, f in TOPK.items()}


# Golden values


@pytest.mark.parametrize("case, run", CASES)
def test_divergences_equal_the_float64_definition(case, run):
    with np.load(LOSSES_FILE) as file:
        z = {name.split("/")[1]: x for name, x in file.items() if name.startswith(case + "/")}
    mask = z["mask"]
    for anchor in ("behavior", "proximal"):
        # a pair whose anchor is proximal_logp: what the proximal losses hand over as the anchor's top-K
        tracked = pair(z["topk_logp"], z[f"topk_{anchor}_logp"], z["has_sampled"])
        at = (z["logp"], z[f"{anchor}_logp"])
        found = [RUN[run](f)(*at) for f in (binary_tv, binary_kl)]
        found += [RUN[run](f)(*at, tracked) for f in (topk_tv, topk_kl)]
        for got, want in zip(found, z[f"from_{anchor}"], strict=True):
            assert got.dtype == jnp.float32
            error = np.abs(np.asarray(got, np.float64) - want) / np.maximum(1, want)
            assert error[mask].max() <= 2e-5


@pytest.mark.parametrize("run", RUN)
def test_binary_gradients_equal_the_closed_form(run):
    rng = np.random.RandomState(0)
    p, a = rng.uniform(0.01, 0.99, (2, 1, 200))
    at = np.log(p).astype(np.float32), np.log(a).astype(np.float32)
    p, a = (np.exp(x.astype(np.float64)) for x in at)
    grad = {name: RUN[run](jax.grad(lambda x, y, f=f: f(x, y).sum()))(*at) for name, f in BINARY.items()}
    np.testing.assert_allclose(grad["tv"], np.sign(p - a) * p, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(grad["kl"], (p - a) / (1 - p), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("inside", [True, False])
def test_topk_gradients_equal_the_closed_form(inside, run):
    rng = np.random.RandomState(1)
    n, k = 20, 4
    log_a, log_p = (np.stack([log_softmax(row) for row in rng.standard_normal((n, V))]) for _ in range(2))
    move = rng.standard_normal((n, V))  # a direction; the sampled token moves alike wherever it is read from
    order = np.argsort(-log_a, axis=1)
    ids, token = order[:, :k], order[:, 1 if inside else -1][:, None]
    want = {"tv": [], "kl": []}
    for i in range(n):
        union = sorted({*ids[i].tolist(), int(token[i, 0])})
        p, a, m = (x[i, union] for x in (np.exp(log_p), np.exp(log_a), move))
        rest_p, rest_a, rest_move = 1 - p.sum(), 1 - a.sum(), -(p * m).sum()
        want["tv"].append(0.5 * ((np.sign(p - a) * p * m).sum() + np.sign(rest_p - rest_a) * rest_move))
        want["kl"].append(-(a * m).sum() - rest_a / rest_p * rest_move)
    at = (token, ids)
    pick_p, pick_a, pick_move = ([np.take_along_axis(x, i, 1)[None] for i in at] for x in (log_p, log_a, move))
    for name, f in TOPK.items():

        def value(logp, tracked_logp, f=f):
            tracked = pair(tracked_logp, pick_a[1], np.full((1, n), inside))
            return f(logp, jnp.asarray(pick_a[0][..., 0], jnp.float32), tracked).sum()

        args = jnp.asarray(pick_p[0][..., 0], jnp.float32), jnp.asarray(pick_p[1], jnp.float32)
        by_sampled, by_tracked = RUN[run](jax.grad(value, argnums=(0, 1)))(*args)
        got = np.asarray(by_sampled) * pick_move[0][..., 0] + (np.asarray(by_tracked) * pick_move[1]).sum(axis=-1)
        np.testing.assert_allclose(got[0], want[name], rtol=1e-4, atol=1e-5)


# Properties


@PROPERTY
@given(logits, logits, st.integers(0, V - 1))
def test_bounds_ordering_and_pinsker(x, y, token):
    """0 <= binary <= top-1 <= top-2 .. <= exact for TV and KL: each merges fewer events than the one before it.

    The sampled token leaves the rest when it enters the top-K, so the order holds whichever side of K it is on.
    """
    log_a, log_p = log_softmax(x), log_softmax(y)
    ladder = [binary_of(log_a, log_p, token)]
    ladder += [topk_of(log_a, log_p, token, k) for k in (1, 2, 3, 6, V)]
    ladder.append(exact(log_a, log_p))
    for coarse, fine in zip(ladder, ladder[1:], strict=False):
        for name in ("tv", "kl"):
            assert coarse[name] <= fine[name] + 1e-5 * max(1, fine[name])
    for d in ladder:
        assert 0 <= d["tv"] <= 1
        assert d["kl"] >= 0 or d is ladder[-1]
        assert 2 * d["tv"] ** 2 <= d["kl"] + 2e-6  # Pinsker


@PROPERTY
@given(logits, logits, st.integers(0, V - 1), st.sampled_from([1, 3, 6]))
def test_tv_is_symmetric(x, y, token, k):
    log_a, log_p = log_softmax(x), log_softmax(y)
    assert binary_of(log_a, log_p, token)["tv"] == pytest.approx(binary_of(log_p, log_a, token)["tv"], abs=1e-7)
    ids = np.argsort(-log_a)[:k]
    has = np.full((1, 1), token in ids)
    a, p = (jnp.full((1, 1), v[token], jnp.float32) for v in (log_a, log_p))
    tracked_a, tracked_p = log_a[ids][None, None], log_p[ids][None, None]
    forth = COMPILED[topk_tv](p, a, pair(tracked_p, tracked_a, has))
    back = COMPILED[topk_tv](a, p, pair(tracked_a, tracked_p, has))
    assert float(forth[0, 0]) == pytest.approx(float(back[0, 0]), abs=1e-6)


@PROPERTY
@given(logits, st.integers(0, V - 1), st.floats(0.01, 1), st.sampled_from([1, 3, 6]))
def test_zero_exactly_when_equal(x, token, gap, k):
    log_a = log_softmax(x)
    for d in (binary_of(log_a, log_a, token), topk_of(log_a, log_a, token, k)):
        assert d == {"tv": 0, "kl": 0}
    moved = np.asarray(x, np.float64)
    moved[token] += gap
    log_p = log_softmax(moved)
    if abs(np.exp(log_p[token]) - np.exp(log_a[token])) > 1e-3:
        for d in (binary_of(log_a, log_p, token), topk_of(log_a, log_p, token, k)):
            assert d["tv"] > 0 and d["kl"] > 0


@PROPERTY
@given(logits, logits, st.integers(0, V - 1))
def test_topk_over_the_whole_vocabulary_is_exact(x, y, token):
    log_a, log_p = log_softmax(x), log_softmax(y)
    want, got = exact(log_a, log_p), topk_of(log_a, log_p, token, V)
    for name in ("tv", "kl"):
        assert got[name] == pytest.approx(want[name], rel=2e-5, abs=5e-6)


def test_the_sampled_token_joins_the_top_k_and_does_not_replace_its_last():
    """K entries in which the sampled token replaces the K-th are not the union: they would miss the 0.3 -> 0.1 move."""
    log_a, log_p = np.log([0.5, 0.3, 0.15, 0.05]), np.log([0.5, 0.1, 0.35, 0.05])
    got = topk_of(log_a, log_p, token=3, k=2)
    assert got["tv"] == pytest.approx(0.2, abs=1e-6)
    assert got["kl"] == pytest.approx(0.3 * np.log(3) + 0.15 * np.log(0.15 / 0.35), abs=1e-6)


def test_kl_is_from_the_anchor_to_the_policy():
    log_a, log_p = np.log([0.9, 0.1]), np.log([0.5, 0.5])
    want = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert binary_of(log_a, log_p, 0)["kl"] == pytest.approx(want, abs=1e-6)
    assert topk_of(log_a, log_p, 1, 1)["kl"] == pytest.approx(want, abs=1e-6)


# Where float32 is thin


@pytest.mark.parametrize("run", RUN)
def test_nearly_deterministic_tokens_have_no_negative_kl(run):
    """1 - p by subtraction makes the KL of 12 to 30% of such tokens negative."""
    rng = np.random.RandomState(2)
    complement = 10 ** rng.uniform(-7, -3, (1, 4000))
    anchor = np.log1p(-complement).astype(np.float32)
    logp = np.log1p(-complement * np.exp(0.1 * rng.standard_normal(complement.shape))).astype(np.float32)

    p, a = np.exp(logp), np.exp(anchor)
    with np.errstate(divide="ignore", invalid="ignore"):
        naive = a * (anchor - logp) + (1 - a) * (np.log(1 - a) - np.log(1 - p))
    assert (naive < 0).mean() > 0.05  # these tokens do spring the trap

    got = np.asarray(RUN[run](binary_kl)(logp, anchor), np.float64)
    lp, la = logp.astype(np.float64), anchor.astype(np.float64)
    cp, ca = -np.expm1(lp), -np.expm1(la)
    want = ca * np.log(ca / cp) - (1 - ca) * (lp - la)
    assert (got >= 0).all()
    assert (np.abs(got - want) <= 2e-6 * np.maximum(ca, cp)).all()
    tv = np.asarray(RUN[run](binary_tv)(logp, anchor), np.float64)
    np.testing.assert_allclose(tv, np.abs(ca - cp), atol=1e-7)


@pytest.mark.parametrize("run", RUN)
def test_nearly_deterministic_top_k_has_no_negative_kl(run):
    rng = np.random.RandomState(3)
    x = rng.standard_normal((2000, V))
    x[:, 0] += rng.uniform(5, 20, 2000)
    log_a = np.stack([log_softmax(row) for row in x])
    log_p = np.stack([log_softmax(row) for row in x + 0.1 * rng.standard_normal(x.shape)])
    log_a, log_p = log_a.astype(np.float32), log_p.astype(np.float32)
    for ids, token in (([0, 1, 2], 0), ([0, 1, 2, 5], 5)):
        tracked = pair(log_p[None, :, :3], log_a[None, :, :3], np.full((1, 2000), token < 3))
        args = [v[None, :, token] for v in (log_p, log_a)]
        got = {name: np.asarray(RUN[run](f)(*args, tracked))[0] for name, f in TOPK.items()}
        a, p = np.exp(log_a[:, ids].astype(np.float64)), np.exp(log_p[:, ids].astype(np.float64))
        rest_a, rest_p = 1 - a.sum(axis=1), 1 - p.sum(axis=1)
        tv = 0.5 * (np.abs(a - p).sum(axis=1) + np.abs(rest_a - rest_p))
        kl = (a * np.log(a / p)).sum(axis=1) + rest_a * np.log(rest_a / rest_p)
        np.testing.assert_allclose(got["tv"], tv, atol=1e-7)
        np.testing.assert_allclose(got["kl"], kl, atol=1e-7)
        assert (got["tv"] >= 0).all() and (got["kl"] >= 0).all()


EXTREME = np.array([0, -1e-38, -1e-10, -1e-7, -1e-3, -0.6931472, -20, -80, -1e4, -np.inf], np.float32)


@pytest.mark.parametrize("run", RUN)
def test_binary_is_finite_at_probabilities_zero_and_one(run):
    logp, anchor = (x.reshape(1, -1) for x in np.meshgrid(EXTREME, EXTREME))
    for name, f in BINARY.items():
        value = RUN[run](f)(logp, anchor)
        assert np.isfinite(value).all() and (value >= 0).all(), name
        assert (value[logp == anchor] == 0).all(), name
        for argument in (0, 1):
            grad = RUN[run](jax.grad(lambda *x, f=f: f(*x).sum(), argnums=argument))(logp, anchor)
            assert np.isfinite(grad).all(), (name, argument)
    tv = np.asarray(binary_tv(logp, anchor))
    assert tv.max() == 1 and (tv[np.isinf(logp) & (anchor == 0)] == 1).all()
    impossible = np.asarray(binary_kl(logp, anchor))[np.isinf(logp) & (anchor == EXTREME[5])]
    assert (impossible > 5).all()  # infinite by definition; finite here, and above any threshold in use


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("has_sampled", [True, False])
def test_topk_is_finite_at_probabilities_zero_and_one(has_sampled, run):
    half = np.log(np.float32(0.5))
    rows = np.array([
        [0, -np.inf, -np.inf], [-1e-10, -23, -30], [half, half, -np.inf], [-1e-38, -90, -1e4], [-1, -2, -3],
        [-np.inf, -np.inf, -np.inf], [-np.inf, 0, -np.inf], [-80, -1e4, -np.inf],
    ], np.float32)
    outside = np.array([-np.inf, -80, -1.5], np.float32)  # the sampled token, where it is not among the K
    i, j, u, v = (x.ravel() for x in np.meshgrid(range(len(rows)), range(len(rows)), range(3), range(3)))
    logp = rows[i, 0] if has_sampled else outside[u]
    anchor = rows[j, 0] if has_sampled else outside[v]
    args = (logp[None], anchor[None], rows[i][None], rows[j][None])
    for name, f in TOPK.items():

        def value(x, y, p, a, f=f):
            return f(x, y, pair(p, a, np.full((1, len(i)), has_sampled)))

        got = RUN[run](value)(*args)
        assert np.isfinite(got).all() and (got >= 0).all(), name
        grads = RUN[run](jax.grad(lambda *x, value=value: value(*x).sum(), argnums=(0, 1, 2, 3)))(*args)
        assert all(np.isfinite(g).all() for g in grads), name
