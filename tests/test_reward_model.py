"""Scores of reward models against transformers' golden ones, alone, in batches and on eight devices."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.hf import load_classifier
from dppo_jax.reward_model import batch_lengths, batches, end_of, make_score
from tests.helpers.fixtures import HURRIED_FLAGS
from tests.helpers.places import GOLDEN, ROOT

MODELS = GOLDEN / "reward_models"
FAMILIES = ("llama", "qwen3", "gemma2", "mistral")
TOLERANCE = 1e-4


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(MODELS / "golden.npz") as file:
        return dict(file)


def rows() -> list[list[int]]:
    """The conversations, without padding."""
    return [row[:length].tolist() for row, length in zip(golden()["tokens"], golden()["lengths"], strict=True)]


@functools.cache
def compiled(family: str):
    """The model, and its score as one compiled function for the tests here."""
    loaded = load_classifier(MODELS / family)
    score = jax.jit(make_score(loaded.config, dtype=jnp.float32))
    return loaded, lambda *arrays: np.asarray(score(loaded.params, *arrays))


def ends(family: str) -> np.ndarray:
    return np.array([end_of(row, compiled(family)[0].pad_id) for row in rows()], np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers(family):
    """All rows in one batch with padding on the right, and one alone without any."""
    _, score = compiled(family)
    tokens, lengths, want = golden()["tokens"], golden()["lengths"], golden()[family]
    assert len(set(np.round(want, 2))) == len(want) and len(set(lengths)) > 3
    np.testing.assert_allclose(score(tokens, lengths, ends(family)), want, rtol=0, atol=TOLERANCE)
    alone = score(tokens[2:3, : lengths[2]], lengths[2:3], ends(family)[2:3])
    np.testing.assert_allclose(alone, want[2:3], rtol=0, atol=TOLERANCE)
    # What padding holds does not matter, and the golden rows tell ends apart.
    other = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 17)
    np.testing.assert_array_equal(score(other, lengths, ends(family)), score(tokens, lengths, ends(family)))
    assert np.abs(score(tokens, lengths, ends(family) - 1) - want).min() > 20 * TOLERANCE


def test_no_weight_could_be_forgotten():
    loaded, _ = compiled("llama")
    score = jax.jit(make_score(loaded.config, dtype=jnp.float32))
    leaves, tree = jax.tree.flatten(loaded.params)
    for i, leaf in enumerate(leaves):
        params = jax.tree.unflatten(tree, [*leaves[:i], leaf * np.float32(1.1), *leaves[i + 1 :]])
        found = np.asarray(score(params, golden()["tokens"], golden()["lengths"], ends("llama")))
        assert np.abs(found - golden()["llama"]).max() > 5 * TOLERANCE, i


def test_the_end_is_the_last_token_that_is_no_padding():
    """As transformers has it: (token_indices * non_pad_mask).argmax(-1)."""
    assert [end_of(ids, 0) for ids in ([5, 6, 7], [5, 0, 7], [5, 0, 7, 0, 0], [0, 0], [0, 3])] == [2, 2, 2, 0, 1]
    assert end_of([5, 0, 0], None) == end_of([5, 0, 0], -1) == 2
    llama, qwen3 = ends("llama"), ends("qwen3")
    closed = golden()["lengths"][:6] - 1
    assert (qwen3[:6] == closed).all() and (llama[:6] < closed).all()  # Llama's turns end with its padding


def test_lengths_of_batches_are_few():
    assert batch_lengths(4096) == (512, 1024, 2048, 4096)
    assert batch_lengths(2000, 128) == (256, 512, 1024, 2048)
    assert batch_lengths(3) == (1, 2, 3) and batch_lengths(1, 128) == (128,)


def test_batches_hold_every_row_once_in_the_least_width():
    rng, widths = np.random.default_rng(0), batch_lengths(40, 8)
    assert widths == (8, 16, 24, 40)
    lengths = rng.integers(1, 41, 37).astype(np.int32)
    tokens = np.where(np.arange(40) < lengths[:, None], rng.integers(1, 99, (37, 40)), 0).astype(np.int32)
    seen, found = [], list(batches(tokens, lengths, lengths - 1, 8, widths))
    for batch in found:
        width = batch.tokens.shape[1]
        assert batch.tokens.shape == (8, width) and width in widths and batch.lengths.max() <= width
        assert all(smaller < batch.lengths.max() for smaller in widths if smaller < width)
        for at, row in enumerate(batch.rows):
            assert batch.tokens[at, : lengths[row]].tolist() == tokens[row, : lengths[row]].tolist()
            assert (batch.lengths[at], batch.ends[at]) == (lengths[row], lengths[row] - 1)
        assert not batch.lengths[len(batch.rows) :].any()
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(37)) and len(found) == 5 and len({b.tokens.shape[1] for b in found}) > 1


def test_bfloat16_is_near_and_is_not_float32():
    loaded = load_classifier(MODELS / "qwen3", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    score = make_score(loaded.config, dtype=jnp.bfloat16)
    found = np.asarray(score(loaded.params, golden()["tokens"], golden()["lengths"], ends("qwen3")))
    assert found.dtype == np.float32 and TOLERANCE < np.abs(found - golden()["qwen3"]).max() < 0.2


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> dict:
    """What tests/helpers/reward_devices.py finds in a process of its own."""
    file = tmp_path_factory.mktemp("devices") / "found.json"
    flags = f"--xla_force_host_platform_device_count=8 {HURRIED_FLAGS}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "tests.helpers.reward_devices", str(file)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])  # Mistral's three heads are not cut
def test_eight_devices_give_the_scores_of_one(eight, family):
    found, want = eight[family], golden()[family][:-1]  # the last row is cut
    np.testing.assert_allclose(found["scores"], want, rtol=0, atol=TOLERANCE)
    assert found["pieces"] == {"embed": 4, "q": 4, "down": 4, "attn_norm": 1}  # of fsdp x tensor = 2 x 2
    assert found["cut"] == 0 and found["compiled"] == [1] * 4 and 0.25 < found["share"] < 0.3
