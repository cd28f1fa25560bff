"""Our logits against PyTorch transformers' golden ones, and proof that the comparison would notice a mistake."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import Policy, load_policy
from dppo_jax.models.rotary import inverse_frequencies
from tests.helpers.places import GOLDEN
from tests.helpers.variants import VARIANTS, write_variant

MODELS = GOLDEN / "models"
FAMILIES = ["llama", "llama_tied", "llama_linear", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma2_plain", "mistral"]
TOLERANCE = 1e-4  # of the largest logit


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(MODELS / "golden.npz") as file:
        return dict(file)


@functools.cache
def compiled(family: str):
    """The policy, and its logits as one compiled function for the tests here."""
    policy = load_policy(str(MODELS / family))
    return policy, jax.jit(policy.logits)


def worst(logits, family: str, rows=slice(None)) -> float:
    """The largest error outside padding, relative to the largest logit."""
    expected, mask = golden()[family][rows], golden()["mask"][rows]
    return float(np.abs(np.asarray(logits) - expected)[mask].max() / np.abs(expected).max())


def worst_of(policy: Policy, family: str) -> float:
    return worst(policy.logits(policy.params, golden()["tokens"], golden()["mask"]), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    """One row without padding, and two with padding on the left."""
    policy, logits = compiled(family)
    ours = logits(policy.params, golden()["tokens"], golden()["mask"])
    assert ours.dtype == jnp.float32 and ours.shape == golden()[family].shape
    padding = (~golden()["mask"]).sum(axis=1)
    assert padding[0] == 0 and (padding[1:] > 0).all()
    for row in range(len(padding)):
        assert worst(ours[row : row + 1], family, slice(row, row + 1)) <= TOLERANCE, f"{padding[row]} padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_padding_holds_does_not_matter(family):
    policy, logits = compiled(family)
    tokens, mask = golden()["tokens"], golden()["mask"]
    a, b = (np.asarray(logits(policy.params, t, mask)) for t in (tokens, np.where(mask, tokens, 17)))
    np.testing.assert_array_equal(a[mask], b[mask])


def test_logits_without_a_mask_and_without_jit():
    policy, _ = compiled("qwen2")
    assert worst(policy.logits(policy.params, golden()["tokens"][:1]), "qwen2", slice(0, 1)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_could_be_forgotten(family):
    """Every tensor of every layer, scaled by 1.1 alone, moves the logits well beyond the tolerance."""
    policy, logits = compiled(family)
    leaves, tree = jax.tree.flatten(policy.params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(policy.params)]
    for i, path in enumerate(paths):
        for layer in range(policy.config.num_layers if "layers" in path else 1):
            scale = np.ones((len(leaves[i]), *[1] * (leaves[i].ndim - 1)), np.float32)
            scale[layer if "layers" in path else slice(None)] = 1.1
            params = jax.tree.unflatten(tree, [*leaves[:i], leaves[i] * scale, *leaves[i + 1 :]])
            assert worst(logits(params, golden()["tokens"], golden()["mask"]), family) > 5 * TOLERANCE, (path, layer)


ROPE_CHANGES = {
    "llama": [
        {"theta": 600.0}, {"kind": "default"}, {"kind": "linear"}, {"factor": 4.0}, {"low_freq_factor": 1.5},
        {"high_freq_factor": 5.0}, {"original_max_position": 64},
    ],
    "llama_tied": [{"theta": 800.0}, {"kind": "linear", "factor": 2.0}],
    "llama_linear": [{"theta": 400.0}, {"kind": "default"}, {"factor": 2.0}],
    "qwen2": [{"theta": 240.0}],
    "qwen3": [{"theta": 480.0}],
    "qwen3_moe": [{"theta": 720.0}],
    "gemma2": [{"theta": 600.0}],
    "gemma2_plain": [{"theta": 960.0}],
    "mistral": [{"theta": 600.0}],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_frequencies_equal_transformers(family):
    """To float32's precision, and every setting changes them."""
    config, expected = compiled(family)[0].config, golden()[f"{family}_inv_freq"]
    np.testing.assert_allclose(inverse_frequencies(config.rope, config.head_dim), expected, rtol=1e-6)
    for change in ROPE_CHANGES[family]:
        other = inverse_frequencies(dataclasses.replace(config.rope, **change), config.head_dim)
        assert np.abs(other / expected - 1).max() > 0.01, change


@pytest.mark.parametrize("field, value", [("rope_theta", 1e4), ("rope_scaling", None), ("rms_norm_eps", 0.02)])
def test_settings_in_the_file_reach_the_logits(field, value, tmp_path):
    """Rope theta and scaling read from the wrong place gave others fluent nonsense."""
    shutil.copytree(MODELS / "llama", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    assert worst_of(load_policy(str(tmp_path)), "llama") > 10 * TOLERANCE


@pytest.mark.parametrize("field, value", [
    ("query_pre_attn_scalar", 21), ("attn_logit_softcapping", 2.2), ("attn_logit_softcapping", None),
    ("final_logit_softcapping", 3.3), ("final_logit_softcapping", None), ("sliding_window", 7), ("sliding_window", 5),
    ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
])  # fmt: skip
def test_settings_of_gemma2_reach_the_logits(field, value, tmp_path):
    shutil.copytree(MODELS / "gemma2", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    assert worst_of(load_policy(str(tmp_path)), "gemma2") > 10 * TOLERANCE


LONGEST = 40  # tokens of the golden rows


def variant(name: str, folder, **changes) -> Policy:
    """Of rows as long as the golden ones."""
    policy = load_policy(str(write_variant(name, folder, **changes)))
    return dataclasses.replace(policy, config=policy.config.for_rows(LONGEST))


def worst_of_variant(policy: Policy, name: str) -> float:
    """The largest error at the last positions of the row without padding, relative to the largest logit there."""
    expected = golden()[name]
    logits = np.asarray(policy.logits(policy.params, golden()["tokens"][:1]))[0, -len(expected) :]
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_transformers(name, tmp_path):
    """Logits, frequencies, attention factor. The family's own config would not do, but for dynamic, which is plain."""
    policy, family = variant(name, tmp_path), VARIANTS[name]["family"]
    rope = policy.config.rope
    assert worst_of_variant(policy, name) <= TOLERANCE
    frequencies = inverse_frequencies(rope, policy.config.head_dim)
    np.testing.assert_allclose(frequencies, golden()[f"{name}_inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(rope.attention_factor, golden()[f"{name}_attention_factor"], rtol=1e-6)
    plain = worst(golden()[name][None], family, (slice(0, 1), slice(-len(golden()[name]), None)))
    assert plain == 0 if name == "dynamic" else plain > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "changes"), {
    "yarn": [{"factor": 3.0}, {"original_max_position": 256}, {"beta_fast": 16.0}, {"beta_slow": 0.5},
             {"truncate": False}, {"theta": 600.0}, {"attention_factor": 1.0}, {"kind": "default"}],
    "yarn_fields": [{"factor": 4.0}, {"original_max_position": 128}, {"beta_fast": 5.0}, {"beta_slow": 0.6},
                    {"truncate": True}, {"theta": 600.0}, {"attention_factor": 1.1}, {"kind": "linear"}],
    "longrope": [{"long": False}, {"attention_factor": 1.0}, {"theta": 600.0}, {"kind": "default"}],
    "longrope_short": [{"long": True}, {"attention_factor": 1.0}],
}.items())  # fmt: skip
def test_no_setting_of_rope_could_be_forgotten(name, changes, tmp_path):
    policy = variant(name, tmp_path)
    for change in changes:
        rope = dataclasses.replace(policy.config.rope, **change)
        other = dataclasses.replace(policy, config=dataclasses.replace(policy.config, rope=rope))
        assert worst_of_variant(other, name) > 10 * TOLERANCE, change


@pytest.mark.parametrize("name", ["longrope", "longrope_short"])
def test_factors_of_longrope_by_the_positions_alone(name, tmp_path):
    """Without a word of a run they are the long ones, since rows may be as long as the model has positions."""
    policy = load_policy(str(write_variant(name, tmp_path)))
    assert policy.config.rope.long
    assert (worst_of_variant(policy, name) <= TOLERANCE) == (name == "longrope")


@pytest.mark.parametrize(("name", "field", "value"), [
    ("no_window", "sliding_window", 30), ("ministral", "sliding_window", 8), ("ministral", "layer_types", None),
    ("qwen2_slides", "sliding_window", 9), ("qwen2_slides", "max_window_layers", 0),
    ("qwen2_slides", "use_sliding_window", False),
])  # fmt: skip
def test_windows_reach_the_logits(name, field, value, tmp_path):
    assert worst_of_variant(variant(name, tmp_path, **{field: value}), name) > 10 * TOLERANCE


def test_bfloat16_is_near_and_is_not_float32():
    policy = load_policy(str(MODELS / "qwen3"), dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(policy.params))
    assert TOLERANCE < worst_of(policy, "qwen3") < 0.1
