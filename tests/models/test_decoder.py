"""The decoder's own promises: stacked equals unrolled, padding is invisible, remat is free, initialisation is alive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.devices.sharding import TRAINING, spec
from dppo_jax.models import load_policy
from dppo_jax.models.attention import self_attention
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import (
    abstract_params,
    as_module,
    forward,
    head_weight,
    init_params,
    param_axes,
    unstack,
)
from dppo_jax.models.hidden import layer_by_layer
from dppo_jax.models.rotary import positions
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
FAMILIES = ["llama", "llama_tied", "llama_linear", "qwen2", "qwen3", "gemma2", "gemma2_plain"]
T, V = 10, 96
TOKENS = np.random.RandomState(0).randint(0, V, (3, T)).astype(np.int32)
LEFT_PADDED = np.arange(T) >= np.array([0, 3, 9])[:, None]

TINY = ModelConfig(
    model_type="qwen3", vocab_size=50, hidden_size=20, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64, tie_embeddings=True, qkv_bias=True,
    o_bias=True, qk_norm=True,
)  # fmt: skip


@functools.cache
def policy(family: str):
    loaded = load_policy(str(MODELS / family))
    return loaded.config, loaded.params


@functools.cache
def hidden_states(family: str):
    """(tokens, mask) -> hidden states, compiled."""
    config, params = policy(family)
    run = jax.jit(functools.partial(forward, config))
    return lambda tokens, mask: np.asarray(run(params, tokens, mask))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stacked_layers_equal_unrolled_ones(family):
    """One is training's scan, the other the rollout's loop."""
    config, params = policy(family)

    @jax.jit
    def unrolled(params, tokens, mask):
        segments = mask.astype(jnp.int32)

        def attend(q, k, v, number, _):
            return self_attention(q, k, v, segments, implementation="xla"), (number, k), None

        listed = unstack(params)
        assert list(listed["layers"]) == list(range(config.num_layers))
        decoder = as_module(config, listed, stacked=False)
        return decoder(tokens, positions(mask), attend, list(range(config.num_layers)))[:2]

    hidden, caches = unrolled(params, TOKENS, LEFT_PADDED)
    want = hidden_states(family)(TOKENS, LEFT_PADDED)
    np.testing.assert_allclose(hidden[LEFT_PADDED], want[LEFT_PADDED], rtol=1e-5, atol=1e-5)
    assert [int(number) for number, _ in caches] == list(range(config.num_layers)), "every layer met its own cache"
    assert len({float(jnp.sum(k)) for _, k in caches}) == config.num_layers


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_layer_by_layer_ends_where_the_pass_ends(family):
    """And begins with the embeddings; every layer adds to what it is given."""
    config, params = policy(family)

    @jax.jit
    def walked(params, tokens, mask):
        walk = layer_by_layer(config, params, tokens, mask.astype(jnp.int32), positions(mask))
        x, after = jax.lax.scan(lambda x, one: (walk.step(x, one),) * 2, walk.entering, walk.layers)
        return walk.entering, after, walk.leave(x)

    entering, after, hidden = walked(params, TOKENS, LEFT_PADDED)
    scale = config.hidden_size**0.5 if family == "gemma2" else 1.0
    np.testing.assert_allclose(entering, scale * params["embed"][TOKENS], rtol=1e-6)
    want = hidden_states(family)(TOKENS, LEFT_PADDED)
    np.testing.assert_allclose(hidden[LEFT_PADDED], want[LEFT_PADDED], rtol=1e-5, atol=1e-5)
    assert after.shape == (config.num_layers, *entering.shape)
    assert (np.abs(np.diff(np.concatenate([entering[None], after]), axis=0)).max(axis=(1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_left_padding_changes_nothing(family):
    """The same tokens behind 0, 3 and 5 padded columns: rope sees the same positions, attention the same keys."""
    tokens, mask = np.full((3, T), 7, np.int32), np.zeros((3, T), bool)
    shifts = (0, 3, 5)
    for row, shift in enumerate(shifts):
        tokens[row, shift : shift + 5] = TOKENS[0, :5]
        mask[row, shift : shift + 5] = True
    hidden = hidden_states(family)(tokens, mask)
    for row, shift in enumerate(shifts):
        np.testing.assert_allclose(hidden[row, shift : shift + 5], hidden[0, :5], rtol=1e-5, atol=1e-5)
    assert np.isfinite(hidden).all(), "padding too: its numbers have no meaning, but reach the gradient times 0"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_samples_in_one_row_do_not_see_each_other(family):
    """Three in a row, with padding between and behind them, against each alone."""
    config, params = policy(family)
    parts = {1: (0, 0, 3), 3: (1, 3, 1), 2: (2, 5, 4)}  # segment: row of TOKENS, first column, length
    tokens, segments, position = np.full((1, T), 7, np.int32), np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
    for segment, (row, first, length) in parts.items():
        at = slice(first, first + length)
        tokens[0, at], segments[0, at], position[0, at] = TOKENS[row, :length], segment, np.arange(length)
    packed = np.asarray(jax.jit(functools.partial(forward, config))(params, tokens, segments, position))
    separate = hidden_states(family)(TOKENS, np.ones((3, T), bool))
    for row, first, length in parts.values():
        np.testing.assert_allclose(packed[0, first : first + length], separate[row, :length], rtol=1e-5, atol=1e-5)


def test_positions_count_real_tokens():
    np.testing.assert_array_equal(positions(jnp.asarray(LEFT_PADDED))[1], [0, 0, 0, 0, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_later_token_leaves_earlier_hidden_states_alone(family):
    run, mask = hidden_states(family), np.ones((3, T), bool)
    before, changed = run(TOKENS, mask), TOKENS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % V
    after = run(changed, mask)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert (np.abs(after[:, 6:] - before[:, 6:]).max(axis=-1) > 1e-4).all(), "and all later ones see it"


@functools.cache
def gradient(remat: str):
    """Of a loss over the real positions, left padding included: compiled, and the program before XLA."""
    direction = np.random.RandomState(1).standard_normal((3, T, TINY.hidden_size)).astype(np.float32)

    def loss(params, tokens):
        hidden = forward(TINY, params, tokens, LEFT_PADDED, remat=remat)
        return jnp.sum(jnp.where(LEFT_PADDED[..., None], hidden * direction, 0))

    lowered = jax.jit(jax.grad(loss)).lower(abstract_params(TINY), TOKENS)
    run = lowered.compile({"xla_backend_optimization_level": 0})  # it compiles longer than it runs
    return lambda params: jax.tree.map(np.asarray, run(params, TOKENS % TINY.vocab_size)), lowered.as_text()


def far_from_initialisation():
    rng = np.random.RandomState(2)
    return jax.tree.map(
        lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32), init_params(TINY, jax.random.key(0))
    )


@pytest.mark.slow
def test_remat_changes_no_gradient():
    """Only what is kept: `full` computes the layer's matrix products again, `dots` fewer of them."""
    params = far_from_initialisation()
    want = gradient("none")[0](params)
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
            gradient(remat)[0](params),
            want,
        )
    none, dots, full = (gradient(remat)[1].count("dot_general") for remat in ("none", "dots", "full"))
    assert none < dots < full


@pytest.mark.parametrize("where", ["at initialisation", "elsewhere"])
def test_gradients_are_finite_and_reach_every_layer(where):
    """Left padding included, where queries see no key but padding. MLP weights of zero would never leave it."""
    params = init_params(TINY, jax.random.key(0)) if where == "at initialisation" else far_from_initialisation()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient("none")[0](params)):
        assert np.isfinite(leaf).all(), path
        per_layer = leaf.reshape(TINY.num_layers if path[0].key == "layers" else 1, -1)
        assert (np.abs(per_layer).max(axis=1) > (1e-3 if where == "elsewhere" else 1e-12)).all(), path


def test_initialisation_is_alive():
    """Norms 1, biases 0, everything else normal with deviation 0.02: every layer its own, none of the MLP zero."""
    params = init_params(TINY, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, leaf = path[-1].key, np.asarray(leaf)
        assert leaf.dtype == np.float32
        if "norm" in name:
            assert (leaf == 1).all()
        elif "bias" in name:
            assert (leaf == 0).all()
        else:
            assert leaf.std() == pytest.approx(0.02, rel=0.15) and abs(leaf.mean()) < 0.003, name
            assert (leaf != 0).all() and np.unique(leaf).size > 0.99 * leaf.size, name
    again, other = init_params(TINY, jax.random.key(0)), init_params(TINY, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    assert (params["layers"]["gate"] != other["layers"]["gate"]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_axes_are_those_of_the_files(family):
    """The tree that a model directory gives, the tree that the decoder declares, and its axis names agree."""
    config, params = policy(family)
    abstract, axes = abstract_params(config), param_axes(config)
    described = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert described == jax.tree.map(lambda p: (p.shape, p.dtype), abstract)
    is_axes = dict(is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(abstract) == jax.tree.structure(axes, **is_axes)
    for (path, shape), names in zip(
        jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(axes, **is_axes), strict=True
    ):
        assert len(names) == len(shape.shape) and set(names) <= set(TRAINING), path
        assert (names[0] == "layers") == (path[0].key == "layers")
        spec(*names)  # no mesh axis twice
    assert ("head" in params) != config.tie_embeddings
    assert head_weight(params) is params["embed" if config.tie_embeddings else "head"]


def test_every_axis_has_the_size_its_name_says():
    """All sizes of this config differ, so that a transposed weight or swapped names would show."""
    sizes = {
        "layers": TINY.num_layers, "vocab": TINY.vocab_size, "embed": TINY.hidden_size, "mlp": TINY.intermediate_size,
        "heads": TINY.num_heads * TINY.head_dim, "kv_heads": TINY.num_kv_heads * TINY.head_dim,
    }  # fmt: skip
    assert len(set(sizes.values())) == len(sizes)

    def check(shape, names):
        for size, name in zip(shape.shape, names, strict=True):
            assert name == "norm" or size == sizes[name], (shape, names)

    jax.tree.map(check, abstract_params(TINY), param_axes(TINY))


def test_the_two_ways_to_make_parameters_agree():
    made = jax.eval_shape(lambda: init_params(TINY, jax.random.key(0)))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), made) == jax.tree.map(
        lambda p: (p.shape, p.dtype), abstract_params(TINY)
    )


def test_bfloat16_computes_in_bfloat16_and_gives_float32_gradients():
    """Parameters are float32 masters: the cast is inside."""
    params = abstract_params(TINY)
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)

    def run(params, tokens):
        return forward(TINY, params, tokens, jnp.ones((2, 4), bool), dtype=jnp.bfloat16)

    assert jax.eval_shape(run, params, tokens).dtype == jnp.bfloat16
    grads = jax.eval_shape(jax.grad(lambda p, t: jnp.sum(run(p, t), dtype=jnp.float32)), params, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
