"""The mismatch report finds faults that are planted on one side of a real rollout, and names the place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.token_head import LogitSums
from dppo_jax.types import TrainBatch
from experiments import regions
from experiments.probe import Measured, Probe
from experiments.questions.mismatch import findings, passes
from experiments.regions import Region, Regions
from tests.helpers.fixtures import hurried, small_config, tiny
from tests.helpers.places import ROOT


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A probe, its parameters, and a batch that they drew."""
    with hurried(tmp_path_factory), Probe(small_config(tiny(tmp_path_factory))) as probe:
        params = probe.state().params
        yield probe, params, probe.draw(params)


def where(drawn, *, training=None, params=None, recorded=None) -> list[str]:
    """What the report says where one side is changed."""
    probe, behavior, batch = drawn
    training, params = training or probe.setup, behavior if params is None else params
    compared = passes.compare(probe, training, params, behavior, *batch)
    mask, mu = np.asarray(batch[0].mask), np.asarray(batch[0].behavior_logp)
    return findings.where_they_part(compared, mask, mu if recorded is None else recorded)


def with_model(drawn, **changes):
    setup = drawn[0].setup
    return dataclasses.replace(setup, given_model=dataclasses.replace(setup.model, **changes))


def test_equal_arithmetic_parts_nowhere(drawn):
    (sentence,) = where(drawn)
    assert "Both passes have the same hidden states" in sentence
    probe, params, batch = drawn
    compared = passes.compare(probe, probe.setup, params, params, *batch)
    mask = np.asarray(batch[0].mask)
    assert max(findings.by_state(compared)) < findings.FLOOR
    np.testing.assert_allclose(compared.logp[mask], np.asarray(batch[0].behavior_logp)[mask], atol=1e-5)
    assert compared.tokens.sum() == (batch[1] + batch[2])[batch[1] > 0].sum()


def test_a_wrong_base_of_rope_is_found(drawn):
    rope = drawn[0].setup.model.rope
    first, *_ = where(drawn, training=with_model(drawn, rope=dataclasses.replace(rope, theta=rope.theta / 10)))
    assert re.match(r"The passes part at layer 0: \de-\d there, (0|\de-\d\d?) before it", first)
    assert "grows with position: rope or positions" in first


def test_one_layer_in_bfloat16_is_found(drawn):
    """The second of two layers, in training: nothing before it differs, and no position is spared."""
    params = drawn[1]
    rounded = {name: w.at[1].set(w[1].astype(jnp.bfloat16).astype(w.dtype)) for name, w in params["layers"].items()}
    said = where(drawn, params={**params, "layers": rounded})
    assert re.fullmatch(r"The passes part at layer 1: \de-\d there, (0|\de-\d\d?) before it\.", said[0])
    assert len(said) == 1


def test_a_temperature_on_one_side_is_found(drawn):
    setup = drawn[0].setup
    config = setup.config.copy_and_resolve_references()
    config.policy.temperature = 0.7
    said = where(drawn, training=dataclasses.replace(setup, config=config))
    assert "the same hidden states" in said[0]
    assert said[1:] == ["The logits differ by a factor of 0.7 (rollout over training): a temperature on one side."]


def test_a_scale_in_the_final_norm_is_no_temperature(drawn):
    """It makes a factor of the logits, too."""
    params = drawn[1]
    said = where(drawn, params={**params, "final_norm": 1.25 * params["final_norm"]})
    assert said[0].startswith("The passes part at the final norm: 2e-1 there")
    assert said[1:] == ["The logits differ by a factor of 0.8 (rollout over training), as the hidden states do."]


def test_weights_that_did_not_reach_the_rollout_are_found(drawn):
    """Both passes agree at the new parameters; what was recorded is of others."""
    probe, params, _ = drawn
    stale = probe.draw(jax.tree.map(lambda p: 3 * p, params))
    said = where((probe, params, stale))
    assert len(said) == 2 and said[1].startswith("The rollout's decoding parts from its own arithmetic")


def test_a_factor_is_told_from_noise():
    rng = np.random.default_rng(0)
    z, mask = rng.standard_normal((2, 3, 50)), np.ones((2, 3), bool)

    def found(y):
        return findings.logit_difference(LogitSums(*(x.sum(-1) for x in ((z - y) ** 2, z * y, z * z, y * y))), mask)

    noise = 0.01 * rng.standard_normal(z.shape)
    scaled, noisy = found(z / 0.7 + noise), found(z + noise)
    assert scaled.is_factor and scaled.factor == pytest.approx(1 / 0.7, abs=0.01)
    assert not noisy.is_factor and noisy.relative == pytest.approx(0.01, rel=0.2)


def test_shares_outside_are_those_of_the_definition():
    """|pi - mu| against the sign of A, in float64; losses without a region, and those that one batch cannot tell of."""
    rng = np.random.default_rng(0)
    mu, pi = np.log(rng.uniform(0.1, 0.9, (2, 4, 6))).astype(np.float32)
    advantages, mask = np.array([0.5, -0.5, 0.0, 1.0], np.float32), rng.random((4, 6)) < 0.8
    batch = TrainBatch(None, None, jnp.zeros(mu.shape, jnp.int32), jnp.asarray(mask), jnp.asarray(mu), advantages)
    names = ("dppo_binary_tv", "dppo_binary_tv_proximal", "cispo", "distill", "relax_low")
    config = small_config(ROOT)
    found = regions.measure(config, regions.inputs_at_rollout(batch, Measured(pi, None, mu, mu)), names)
    counted = mask & (advantages != 0)[:, None]
    moved = np.sign(advantages)[:, None] * (np.exp(pi.astype(np.float64)) - np.exp(mu.astype(np.float64)))
    outside = (moved > config.loss_defaults.dppo_binary_tv.delta_high)[counted].mean()
    assert found.tokens == counted.sum() and 0 < outside < 1
    assert found.by_loss["dppo_binary_tv"] == (pytest.approx(outside), False)
    assert found.by_loss["dppo_binary_tv_proximal"] == (0, True)
    assert found.without == ("cispo",) and "teacher_logp" in found.left_out["distill"]
    assert "needs loss.alpha" in found.left_out["relax_low"]


def test_the_verdict_follows_the_survival_map():
    """Its numbers stand in the README of that question."""
    page = (ROOT / "experiments/questions/survival/README.md").read_text()
    for share in (findings.LIVES, findings.DIES, findings.DIES_EVERYWHERE):
        assert f"| {findings.percent(share)} |" in page

    def verdict(outside: float, name: str = "kpop", tokens: int = 5000) -> str:
        return findings.verdict(name, Regions(tokens, {"kpop": Region(outside, False)}, ("cispo",), {"distill": "why"}))

    assert verdict(0.0).startswith("Your region is safe: 0% of the 5,000 tokens with A≠0 are outside kpop before any")
    assert "so few tokens" in verdict(0.0, tokens=100) and "so few tokens" not in verdict(0.0)
    said = [verdict(share) for share in (0.005, 0.03, 0.3)]
    assert all(sentence.startswith("Your region is touched by noise") for sentence in said) and len({*said}) == 3
    assert "every learning rate" in said[2]
    assert "has no region" in verdict(0.0, "cispo") and "why" in verdict(0.0, "distill")
    assert "equal rewards" in verdict(0.0, tokens=0)
