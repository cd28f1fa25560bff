"""The update: its gradient ≡ plain autodiff, cut and packed in any way; its step ≡ AdamW by hand; blind elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import packing
from dppo_jax.losses import LossInputs, bind_loss
from dppo_jax.metrics import summary
from dppo_jax.models.decoder import forward
from dppo_jax.optimizer import make_optimizer
from dppo_jax.teacher_forced import make_policy_logprobs
from dppo_jax.train_step import assemble, init_state, loss_inputs, make_update
from dppo_jax.types import HeadOutput, PackedBatch, PromptBatch, RolloutBatch, TrainBatch
from dppo_jax.weights import WEIGHTS
from tests.helpers.fixtures import COMPILER_OPTIONS, TINY, random_params

B, P, R, K = 8, 5, 6, 3
TEMPERATURE, CONSTANT = 0.7, 11.0
NAMES = [name for name in sorted(WEIGHTS) if name != "prompt_mean_token_mean"]  # that one needs groups
ALL = tuple(range(B))
# Rows in a piece, and whether several samples share one. One piece of 8 rows, up to 8 pieces of one row.
CUTS = [(8, False), (4, False), (2, False), (1, False), (8, True), (4, True), (2, True), (1, True)]
LOSS = dict(delta_low=0.01, delta_high=0.02, ratio_cap=1.1)
ADAMW = dict(b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.1, clip_norm=0.05)
RATES = (0.01, 0.02)  # of the first two updates


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def batch(params) -> TrainBatch:
    """Ragged prompts and responses, advantages of every sign, NaN wherever the mask is False."""
    numbers = np.random.default_rng(1)
    prompt_mask = np.arange(P) >= P - numbers.integers(1, P + 1, size=(B, 1))
    mask = np.arange(R) < numbers.integers(1, R + 1, size=(B, 1))
    mask[0] = True
    tokens = numbers.integers(TINY.vocab_size, size=(B, P + R)).astype(np.int32)
    rows = TrainBatch(
        prompt_tokens=tokens[:, :P],
        prompt_mask=prompt_mask,
        tokens=tokens[:, P:],
        mask=mask,
        behavior_logp=np.zeros((B, R), np.float32),
        advantages=np.array([1, -1, 0.5, -0.5, 0, 1, -1, -0.25], np.float32),
    )
    behavior_logp = np.minimum(plain_logp(params, rows)[0] + numbers.normal(size=(B, R)) * 0.5, -1e-3)
    return rows.replace(behavior_logp=np.where(mask, behavior_logp, np.nan).astype(np.float32))


def plain_logits(params, batch):
    """softmax's argument at every response token, without the token head."""
    tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
    mask = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)
    hidden = forward(TINY, params, tokens, mask)[:, P - 1 : -1]
    return jnp.einsum("bre,ve->brv", hidden, params["embed"]) / TEMPERATURE


def of_tokens(log_p, tokens):
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def plain(params, batch, scale):
    """-sum(scale * log_softmax), its gradient, logp and log_softmax."""

    def objective(params):
        log_p = jax.nn.log_softmax(plain_logits(params, batch))
        logp = of_tokens(log_p, batch.tokens)
        return -jnp.sum(scale * logp), (logp, log_p)

    (value, (logp, log_p)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    return value, gradient, logp, log_p


def plain_logp(params, batch) -> tuple[np.ndarray, np.ndarray]:
    _, _, logp, log_p = plain(params, batch.replace(behavior_logp=jnp.zeros((B, R))), jnp.zeros((B, R)))
    return np.asarray(logp), np.asarray(log_p)


def weights(name, mask) -> np.ndarray:
    """By definition; tests/test_weights.py holds the functions to it too."""
    mask, rows = mask.astype(np.float64), len(mask)
    own = mask.sum(axis=1, keepdims=True)
    return {
        "token_mean": mask / mask.sum(),
        "seq_mean_token_mean": mask / own / rows,
        "seq_mean_token_sum": mask / rows,
        "seq_sum_const": mask / rows / CONSTANT,
    }[name]


def coefficients(batch, logp) -> tuple[np.ndarray, np.ndarray]:
    """(coef, dropped) of dppo_binary_tv in float64, by definition."""
    p, q = np.exp(logp.astype(np.float64)), np.exp(np.where(batch.mask, batch.behavior_logp, 0.0).astype(np.float64))
    a = np.broadcast_to(batch.advantages[:, None], p.shape)
    dropped = batch.mask & np.where(a > 0, p - q > LOSS["delta_high"], (a < 0) & (q - p > LOSS["delta_low"]))
    return np.where(batch.mask & ~dropped, np.minimum(p / q, LOSS["ratio_cap"]) * a, 0.0), dropped


def expected_gradient(name, params, batch, rows=ALL):
    """Of the minibatch of these rows."""
    rows, (logp, _) = list(rows), plain_logp(params, batch)
    scale = np.zeros((B, R))
    scale[rows] = weights(name, batch.mask[rows]) * coefficients(batch, logp)[0][rows]
    clean = batch.replace(behavior_logp=jnp.zeros((B, R)))
    return jax.device_get(plain(params, clean, scale.astype(np.float32))[1])


OPTIMIZER = make_optimizer(lambda update: jnp.asarray(RATES)[update], **ADAMW)
SCORE = make_policy_logprobs(TINY, temperature=TEMPERATURE, dtype=jnp.float32, remat="none", vocab_chunks=3)


@functools.cache
def compiled():
    """update(state, batch, plan, which of NAMES): one compilation for all aggregations and all plans of a shape."""

    def update(state, batch, plan, which):
        table = [functools.partial(WEIGHTS[name], constant=CONSTANT) for name in NAMES]
        weigh = lambda mask, group: jax.lax.switch(which, table, mask)  # noqa: E731
        return make_update(SCORE, bind_loss("dppo_binary_tv", LOSS), weigh, OPTIMIZER)(state, batch, plan)

    return jax.jit(update, compiler_options=COMPILER_OPTIONS)


@functools.cache
def fresh():
    return jax.jit(lambda p: init_state(p, OPTIMIZER))


def plan(batch, cut, rows=ALL):
    shape = packing.pack_shape(prompt_length=P, max_new_tokens=R, rows=cut[0], mean_prompt=2)
    lengths = batch.prompt_mask.sum(axis=1), batch.mask.sum(axis=1)
    return packing.plan(np.array(rows), *lengths, shape, packed=cut[1])


def run(params, batch, name="token_mean", cut=CUTS[0], steps=1, rows=ALL):
    state = fresh()(params)
    for _ in range(steps):
        state, metrics = compiled()(state, batch, plan(batch, cut, rows), NAMES.index(name))
    return jax.device_get((state, metrics))


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x.astype(np.float64))) for x in jax.tree.leaves(tree))))


def close(tree, other, rtol=0.0, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


def first_moment(state):
    return next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))


def test_the_batch_puts_the_loss_to_the_test(params, batch):
    """Tokens of both signs are dropped and kept, weights are capped and not."""
    logp, log_p = plain_logp(params, batch)
    coef, dropped = coefficients(batch, logp)
    a = np.broadcast_to(batch.advantages[:, None], coef.shape)
    assert (dropped & (a > 0)).any() and (dropped & (a < 0)).any() and ((coef > 0).any() and (coef < 0).any())
    capped = np.isclose(np.abs(coef), LOSS["ratio_cap"] * np.abs(a)) & (coef != 0)
    assert capped.any() and (~capped & (coef != 0)).any()
    assert log_p.max() > np.log(0.5)


def test_the_cuts_put_packing_to_the_test(params, batch):
    """Fewer rows in use than samples, pieces left empty, rows of one, two and more samples."""
    counts = {cut: int(plan(batch, cut).num_microbatches) for cut in CUTS}
    assert [counts[rows, False] for rows in (8, 4, 2, 1)] == [1, 2, 4, 8]
    assert 1 < counts[2, True] < 4 and 1 < counts[1, True] < 8
    shared = np.bincount(plan(batch, (8, True)).rows, minlength=8).tolist()
    assert {0, 1, 2} <= set(shared) and sum(shared) == B


def check_gradient(state, metrics, expected):
    """Adam's first moment after one update is the clipped gradient, but for a factor."""
    assert summary(metrics)["grad_norm"] == pytest.approx(norm(expected), rel=1e-5)
    assert norm(expected) > ADAMW["clip_norm"]
    clipped = jax.tree.map(lambda g: g * ADAMW["clip_norm"] / norm(expected), expected)
    moment = jax.tree.map(lambda m: m / (1 - ADAMW["b1"]), first_moment(state))
    close(moment, clipped, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_plain_autodiff(params, batch, name, cut):
    check_gradient(*run(params, batch, name, cut), expected_gradient(name, params, batch))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_some_of_the_rows(params, batch, name, packed):
    """A minibatch is a part of the batch, in any order, and its weights are its own."""
    some = (6, 1, 7, 2)
    check_gradient(*run(params, batch, name, (2, packed), rows=some), expected_gradient(name, params, batch, some))


@pytest.mark.parametrize("name", NAMES)
def test_surrogate_is_the_weighted_sum_of_coefficients(params, batch, name):
    logp, _ = plain_logp(params, batch)
    expected = np.sum(weights(name, batch.mask) * coefficients(batch, logp)[0])
    _, metrics = run(params, batch, name)
    assert summary(metrics)["loss/surrogate"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cut", CUTS[1:], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_pieces_change_neither_metrics_nor_update(params, batch, name, cut):
    state, metrics = run(params, batch, name)
    pieces, piece_metrics = run(params, batch, name, cut)
    got, want = summary(piece_metrics), summary(metrics)
    assert got.keys() == want.keys()
    for tag in want:
        assert got[tag] == pytest.approx(want[tag], rel=1e-5, abs=1e-7), tag
    close(piece_metrics.histograms, metrics.histograms)
    assert metrics.histograms["ratio"].sum() == batch.mask.sum()
    close(first_moment(pieces), first_moment(state), rtol=1e-4, atol=1e-8)
    close(pieces.params, state.params, atol=1e-6)
    assert norm(jax.tree.map(np.subtract, state.params, params)) > 0.1


def test_two_updates_equal_adamw_by_hand(params, batch):
    """float64 NumPy around gradients of plain autodiff."""
    p = jax.tree.map(lambda x: x.astype(np.float64), params)
    m, v = (jax.tree.map(np.zeros_like, p) for _ in range(2))
    b1, b2 = ADAMW["b1"], ADAMW["b2"]
    for t, rate in enumerate(RATES, start=1):
        g = expected_gradient("token_mean", jax.tree.map(np.float32, p), batch)
        clip = min(1.0, ADAMW["clip_norm"] / norm(g))
        g = jax.tree.map(lambda x, clip=clip: x.astype(np.float64) * clip, g)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, g)

        def after(p, m, v, t=t, rate=rate):
            step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + ADAMW["eps"])
            return p - rate * (step + ADAMW["weight_decay"] * p)

        p = jax.tree.map(after, p, m, v)
    state, _ = run(params, batch, cut=(2, True), steps=2)
    assert state.updates == 2
    close(state.params, p, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_what_stands_outside_the_mask_changes_nothing(params, batch, packed):
    numbers = np.random.default_rng(2)
    noise = numbers.integers(TINY.vocab_size, size=(B, P + R)).astype(np.int32)
    other = batch.replace(
        prompt_tokens=np.where(batch.prompt_mask, batch.prompt_tokens, noise[:, :P]),
        tokens=np.where(batch.mask, batch.tokens, noise[:, P:]),
        behavior_logp=np.where(batch.mask, batch.behavior_logp, -3.0).astype(np.float32),
    )
    first, second = (run(params, b, cut=(4, packed)) for b in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first))


@pytest.mark.parametrize("packed", [False, True])
def test_nan_outside_the_mask_reaches_no_gradient(packed):
    """Whatever the policy says there: logp, entropy and tracked tokens."""
    numbers = np.random.default_rng(3)
    mask = np.arange(R) < numbers.integers(1, R, size=(B, 1))
    draw = lambda *shape: np.log(numbers.uniform(0.1, 0.9, size=shape)).astype(np.float32)  # noqa: E731
    ids = np.argsort(numbers.uniform(size=(B, R, TINY.vocab_size)))[..., :K].astype(np.int32)
    rows = TrainBatch(
        prompt_tokens=np.zeros((B, P), np.int32),
        prompt_mask=np.ones((B, P), bool),
        tokens=numbers.integers(TINY.vocab_size, size=(B, R)).astype(np.int32),
        mask=mask,
        behavior_logp=draw(B, R),
        advantages=np.linspace(-1, 1, B, dtype=np.float32),
        topk_ids=ids,
        topk_behavior_logp=draw(B, R, K) - 3,
        proximal_logp=draw(B, R),
        topk_proximal_logp=draw(B, R, K) - 3,
    )

    def hide(x, mask, outside):
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, outside)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def update(state, batch, plan, outside):
        def score(params, packed):
            log_p = jax.nn.log_softmax(params["w"] + jnp.zeros((*packed.mask.shape, 1)))
            logp, at = of_tokens(log_p, packed.targets), jnp.take_along_axis(log_p, packed.topk_ids, axis=-1)
            return HeadOutput(*(hide(x, packed.mask, outside) for x in (logp, -logp, at)))

        loss = bind_loss("dppo_topk_kl_proximal", LOSS)
        weigh = functools.partial(WEIGHTS["token_mean"], constant=1.0)
        return make_update(score, loss, weigh, OPTIMIZER)(state, batch, plan)

    def after(outside):
        names = ("behavior_logp", "topk_behavior_logp", "proximal_logp", "topk_proximal_logp")
        given = rows.replace(**{name: np.asarray(hide(getattr(rows, name), mask, outside)) for name in names})
        params = {"w": np.linspace(-1, 1, TINY.vocab_size, dtype=np.float32)}
        return jax.device_get(update(init_state(params, OPTIMIZER), given, plan(given, (4, packed)), outside))

    clean, dirty = after(-1.0), after(jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert norm(first_moment(clean[0])) > 0


def test_assemble_gives_every_row_its_prompt():
    n, group = 3, 2
    rows = n * group
    prompts = PromptBatch(
        tokens=np.arange(n * P, dtype=np.int32).reshape(n, P),
        mask=np.arange(P) >= np.array([[1], [2], [3]]),
        group=np.arange(n, dtype=np.int32),
    )
    rollout = RolloutBatch(
        tokens=np.arange(rows * R, dtype=np.int32).reshape(rows, R),
        response_mask=np.arange(R) < np.arange(1, rows + 1)[:, None],
        behavior_logp=np.arange(rows * R, dtype=np.float32).reshape(rows, R),
        truncated=np.zeros(rows, bool),
        group=np.repeat(prompts.group, group),
        topk_ids=np.arange(rows * R * K, dtype=np.int32).reshape(rows, R, K),
        topk_logp=np.arange(rows * R * K, dtype=np.float32).reshape(rows, R, K),
    )
    whole = assemble(prompts, rollout)
    np.testing.assert_array_equal(whole.prompt_tokens, prompts.tokens[rollout.group])
    np.testing.assert_array_equal(whole.prompt_mask, prompts.mask[rollout.group])
    assert whole.advantages.shape == (rows,) and not whole.advantages.any()
    for name in ("tokens", "behavior_logp", "topk_ids"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(rollout, name))
    np.testing.assert_array_equal(whole.mask, rollout.response_mask)
    np.testing.assert_array_equal(whole.topk_behavior_logp, rollout.topk_logp)
    assert whole.proximal_logp is None and whole.topk_proximal_logp is None


def test_the_loss_sees_what_the_batch_holds():
    """Top-K with the sampled token found among the tracked; everything else as it is."""
    m, q = 3, 4
    numbers = np.random.default_rng(4)
    at = numbers.normal(size=(6, m, q, K)).astype(np.float32)
    whole = dict.fromkeys(("tokens", "segments", "positions"), np.zeros((m, q + 2), np.int32))
    packed = PackedBatch(
        **whole,
        columns=np.zeros((m, q), np.int32),
        targets=numbers.integers(2 * K, size=(m, q)).astype(np.int32),
        mask=numbers.uniform(size=(m, q)) < 0.5,
        weights=at[0, ..., 0],
        behavior_logp=at[1, ..., 0],
        advantages=at[2, ..., 0],
    )
    full = packed.replace(
        topk_ids=np.tile(np.arange(K, dtype=np.int32), (m, q, 1)),
        topk_behavior_logp=at[3],
        proximal_logp=at[4, ..., 0],
        topk_proximal_logp=at[4],
    )
    head = HeadOutput(logp=at[5, ..., 0], entropy=at[5, ..., 1], ids_logp=at[5], vocabulary=jnp.int32(2 * K))
    inputs = loss_inputs(full, head)
    assert isinstance(inputs, LossInputs)
    np.testing.assert_array_equal(inputs.topk.has_sampled, packed.targets < K)
    for got, want in (
        (inputs.logp, head.logp),
        (inputs.mask, packed.mask),
        (inputs.advantages, packed.advantages),
        (inputs.behavior_logp, packed.behavior_logp),
        (inputs.proximal_logp, full.proximal_logp),
        (inputs.topk.logp, head.ids_logp),
        (inputs.topk.behavior_logp, at[3]),
        (inputs.topk.proximal_logp, at[4]),
        (inputs.topk.outside, np.where(packed.targets < K, K, K - 1)),
    ):
        np.testing.assert_array_equal(got, want)
    assert loss_inputs(packed, head).topk is None
