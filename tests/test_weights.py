"""Aggregation weights against float64, and what their sums must be."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.weights import WEIGHTS
from tests.helpers.places import GOLDEN

with np.load(GOLDEN / "losses" / "losses.npz") as _file:
    STORED = {name: x for name, x in _file.items() if name.startswith("weights/")}
    CONSTANT = json.loads(str(_file["json/constant"]))
NAMES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_const")
RUN = {"eager": lambda f: f, "jit": jax.jit}


def test_the_table_is_complete():
    assert set(WEIGHTS) == {*NAMES, "prompt_mean_token_mean"}  # that one: test_methods


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_float64_definition(name, run):
    """Full rows, ragged rows with a hole and an empty one, and no token at all."""
    for mask, want in zip(STORED["weights/mask"], STORED[f"weights/{name}"], strict=True):
        got = RUN[run](partial(WEIGHTS[name], constant=CONSTANT))(jnp.asarray(mask))
        assert got.shape == mask.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_only_seq_sum_const_uses_the_constant(name):
    mask = jnp.asarray(STORED["weights/mask"][1])
    one, two = WEIGHTS[name](mask, constant=1.0), WEIGHTS[name](mask, constant=2.0)
    np.testing.assert_allclose(one, 2 * two if name == "seq_sum_const" else two, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_a_token_changes_nothing(name):
    mask = np.arange(6) < np.array([6, 2, 4])[:, None]
    padded = np.concatenate([mask, np.zeros((2, 6), bool)])
    got = WEIGHTS[name](jnp.asarray(padded), constant=CONSTANT)
    np.testing.assert_allclose(got[:3], WEIGHTS[name](jnp.asarray(mask), constant=CONSTANT), rtol=1e-6)


@pytest.mark.parametrize("name", ["token_mean", "seq_mean_token_mean"])
def test_means_sum_to_one(name):
    mask = jnp.asarray(STORED["weights/mask"][1])
    assert float(WEIGHTS[name](mask, constant=CONSTANT).sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_one_minibatch_add_up_to_it(name):
    """Computed once per minibatch: the gradients of its pieces sum to the gradient of the whole.

    A mean over each piece, averaged again, would not.
    """
    mask = np.arange(6) < np.array([6, 1, 3, 2])[:, None]
    values = np.random.RandomState(0).standard_normal(mask.shape)
    weights = np.asarray(WEIGHTS[name](jnp.asarray(mask), constant=CONSTANT), np.float64)
    pieces = sum((weights[i : i + 2] * values[i : i + 2]).sum() for i in (0, 2))
    again = sum(
        (np.asarray(WEIGHTS[name](jnp.asarray(mask[i : i + 2]), constant=CONSTANT)) * values[i : i + 2]).sum() / 2
        for i in (0, 2)
    )
    assert pieces == pytest.approx((weights * values).sum(), abs=1e-12)
    if name == "token_mean":
        assert abs(again - pieces) > 1e-3
