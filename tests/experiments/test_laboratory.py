"""Every method takes a step; critic, perturbation, lag, resampling, narrower rollouts and regions in the loop."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.methods import METHODS
from dppo_jax.errors import UserError
from dppo_jax.metrics import summary
from dppo_jax.models.decoder import LOG_SIGMA
from dppo_jax.storage.checkpoint import restore_params
from dppo_jax.storage.run_log import read_scalars
from dppo_jax.teacher_forced import make_recompute
from dppo_jax.train_step import init_state
from experiments.probe import Probe
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.run.samples import chosen
from experiments.run.setup import Setup
from tests.helpers.fixtures import hurried, run, run_config, same, small_config, tiny
from tests.helpers.places import ROOT


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


def last(folder: Path, tag: str) -> float:
    return read_scalars(folder)[tag][1][-1]


@pytest.fixture(scope="module")
def drawn():
    """A batch of the embedded default, with everything that some loss may ask for, and its probe."""
    c = load_config(str(ROOT / "configs" / "quickstart.py"), [])
    c.policy.path, c.compile_cache = str(ROOT / "assets" / "tiny"), ""
    c.rollout.prompts, c.rollout.group_size, c.train.minibatches = 4, 4, 1
    with Probe(c, topk=20, entropy=True) as probe:
        params = probe.state().params
        batch, lengths, prompts = probe.draw(params)
        plan = probe.plan(np.arange(len(lengths)), lengths, prompts)
        for policy in ("proximal", "reference"):
            batch = jax.jit(make_recompute(probe.setup.policy_logprobs, policy))(params, batch, plan)
        batch = batch.replace(teacher_logp=batch.reference_logp - 0.1)
        yield probe, batch, plan, params


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_a_step_on_the_embedded_default(name, drawn):
    probe, batch, plan, params = drawn
    c = load_config(f"{ROOT}/configs/methods.py:{name}", [])
    checks.check(c)
    setup = Setup(c, probe.setup.model, mean_prompt=probe.setup.mean_prompt)
    needed = setup.needed
    fields = ("proximal_logp", "reference_logp", "teacher_logp", "behavior_entropy")
    absent = [field for field in fields if field not in needed]
    absent += [] if "topk" in needed else ["topk_ids", "topk_behavior_logp", "topk_proximal_logp"]
    batch = batch.replace(**dict.fromkeys(absent))
    state = init_state(setup.initial_params(params), setup.optimizer)
    update = jax.jit(setup.update)
    after, metrics = update(state, batch, plan, *([params] if "exact" in needed else []))
    found = summary(metrics)
    assert np.isfinite(found["grad_norm"]) and found["grad_norm"] > 0
    assert 0 <= found["trust_region/masked"] < 1
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), after.params["embed"], state.params["embed"])
    assert 0 < moved < 0.01


def test_ppo_with_a_critic_resumes_bit_for_bit(folder, tmp_path):
    numbers = dict(advantage__name="gae", loss__name="ppo_clip", critic__learning_rate=0.02)
    whole = run(run_config(folder, **numbers), tmp_path / "whole")
    run(run_config(folder, **numbers | {"steps": 2}), tmp_path / "cut")
    run(run_config(folder, **numbers), tmp_path / "cut")
    same(whole.folder, tmp_path / "cut")
    assert min(read_scalars(whole.folder)["critic/loss"][1]) > 0


def test_lagged_behavior_resumes_bit_for_bit_and_is_older(folder, tmp_path):
    whole = run(run_config(folder, rollout__lag=3), tmp_path / "whole")
    run(run_config(folder, rollout__lag=3, steps=2), tmp_path / "cut")
    run(run_config(folder, rollout__lag=3), tmp_path / "cut")
    same(whole.folder, tmp_path / "cut")
    fresh = run(run_config(folder), tmp_path / "fresh")
    # Two updates a step: the first minibatch of a step is off-policy only where the rollout lags.
    lagged = last(whole.folder, "first_minibatch/abs_prob_diff_mean")
    assert lagged > 10 * last(fresh.folder, "mismatch/abs_prob_diff_mean")


@pytest.mark.parametrize("kind", ["weights", "activations"])
@pytest.mark.parametrize("formats", [("m12", "m6", "m3"), ("bfloat16", "float8"), ("int8", "int4")])
def test_a_narrower_rollout_mismatches_more(kind, formats, folder, tmp_path):
    found = [0.0]
    for name in formats:
        c = small_config(folder, steps=1, checkpoint__every=0, **{f"rollout__{kind}": name})
        found.append(last(run(c, tmp_path / name).folder, "mismatch/abs_prob_diff_mean"))
    assert all(b > a for a, b in zip(found, found[1:], strict=False)), found


def test_a_training_temperature_of_its_own_is_a_mismatch(folder, tmp_path):
    c = small_config(folder, steps=1, policy__temperature=1.1)
    assert last(run(c, tmp_path / "run").folder, "mismatch/abs_prob_diff_mean") > 1e-3


def test_exact_dppo_bounds_its_estimates_in_the_loop(folder, tmp_path):
    c = small_config(
        folder,
        loss__name="dppo_exact_tv",
        log__regions=("dppo_exact_tv", "dppo_binary_tv", "dppo_topk_tv", "ppo_clip", "gspo"),
        log__tokens=1,
        rollout__tracked=3,
        rollout__activations="m4",
        loss_defaults__dppo_exact_tv__delta_low=0.01,
        loss_defaults__dppo_exact_tv__delta_high=0.01,
        loss_defaults__dppo_topk_tv__delta_low=0.01,
        loss_defaults__dppo_topk_tv__delta_high=0.01,
    )
    found = read_scalars(run(c, tmp_path / "run").folder)
    masked = {name: np.asarray(found[f"region/{name}/masked"][1]) for name in c.log.regions}
    # Of one token, binary <= top-K <= exact: the exact region masks whatever the estimates mask.
    assert (masked["dppo_exact_tv"] >= masked["dppo_topk_tv"]).all()
    assert (masked["dppo_topk_tv"] >= masked["dppo_binary_tv"]).all()
    assert masked["dppo_exact_tv"].max() > masked["dppo_binary_tv"].max() > 0
    np.testing.assert_allclose(masked["dppo_exact_tv"], found["trust_region/masked"][1], rtol=1e-6)
    signs = found["region/ppo_clip/masked_positive"][1], found["region/ppo_clip/masked_negative"][1]
    np.testing.assert_allclose(np.sum(signs, axis=0), masked["ppo_clip"], rtol=1e-5, atol=1e-7)
    for a, b in (("dppo_exact_tv", "dppo_binary_tv"), ("dppo_topk_tv", "ppo_clip")):
        agreement = np.asarray(found[f"region_agreement/{a}/{b}"][1])
        assert (agreement <= 1).all() and (agreement >= 1 - masked[a] - masked[b] - 1e-6).all()


def test_regions_change_nothing(folder, tmp_path):
    plain = run(small_config(folder), tmp_path / "plain")
    watched = run(small_config(folder, log__regions=("ppo_clip", "cppo", "minirl")), tmp_path / "watched")
    one, two = read_scalars(plain.folder), read_scalars(watched.folder)
    for tag in ("reward/mean", "grad_norm", "loss/surrogate", "trust_region/masked"):
        np.testing.assert_allclose(one[tag][1], two[tag][1], rtol=1e-4, err_msg=tag)


def test_the_perturbation_is_learned_and_saved(folder, tmp_path):
    c = run_config(folder, alp__sigma=0.05, alp__learning_rate=0.1, loss__name="ppo_clip")
    finished = run(c, tmp_path / "run")
    from dppo_jax.models.hf import load_config as load_model

    model = load_model(folder / "model")
    learned = restore_params(finished.folder, Setup(c, model).param_shapes)[LOG_SIGMA]
    assert learned.shape == (model.num_layers,)
    assert (np.abs(np.asarray(learned) - np.log(0.05)) > 0.01).all()
    assert LOG_SIGMA not in [path.stem for path in (finished.folder / "policy").iterdir()]
    run(run_config(folder, alp__sigma=0.05, alp__learning_rate=0.1, loss__name="ppo_clip", steps=2), tmp_path / "cut")
    run(c, tmp_path / "cut")
    same(finished.folder, tmp_path / "cut")


def test_resampling_fills_the_batch_with_unequal_groups(folder, tmp_path):
    one = run(small_config(folder), tmp_path / "one").folder
    more = run(small_config(folder, rollout__resample=4), tmp_path / "more").folder
    few, many = (np.asarray(read_scalars(f)["reward/zero_variance_groups"][1]) for f in (one, more))
    assert few[0] > 0 and many[0] < few[0]
    assert read_scalars(more)["rollout/resampled"][1][0] >= 1


def test_places_of_equal_groups_are_filled_in_order():
    kept, more = np.array([True, False, False, True, False]), np.array([False, True, False, False, True])
    assert chosen(kept, more).tolist() == [0, 6, 9, 3, 4]


def test_equal_groups_are_not_computed(folder, tmp_path):
    kept = run(small_config(folder, steps=1), tmp_path / "kept").folder
    dropped = run(small_config(folder, steps=1, advantage__drop_equal=True), tmp_path / "dropped").folder
    # Their advantages are 0: with token_mean, only the denominator changes, by the same factor for all.
    assert last(dropped, "grad_norm") > last(kept, "grad_norm")


def test_the_reference_penalty_pulls_back(folder, tmp_path):
    free = run(small_config(folder, loss__name="ppo_clip"), tmp_path / "free").folder
    held = run(small_config(folder, loss__name="ppo_clip", reference__coef=5.0), tmp_path / "held").folder
    assert "loss/reference_kl" in read_scalars(held) and "loss/reference_kl" not in read_scalars(free)


REFUSED = {
    "corrects the mismatch": dict(alp__sigma=0.1, loss__name="token_tis"),
    "draws from the parameters of its step": dict(train__staleness=1, rollout__resample=2),
    "both age the behavior": dict(train__staleness=1, rollout__lag=2),
    "exact divergences need": dict(train__staleness=1, loss__name="dppo_exact_kl"),
    "the nearest is 'int8'": dict(rollout__weights="int9"),
    "rollout.activations = 'm40'": dict(rollout__activations="m40"),
    "the nearest is 'k3'": dict(reference__estimator="k4"),
    "the nearest is 'ppo_clip'": dict(log__regions=("ppo_clp",)),
    "policy.temperature = 0.0": dict(policy__temperature=0.0),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_compose_is_refused_in_a_sentence(sentence, folder):
    with pytest.raises(UserError, match=sentence):
        checks.check(small_config(folder, **REFUSED[sentence]))
