"""Runs with a reward model, without answers, and with a KL in the reward; and the configs that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from configs import base
from dppo_jax.advantages import ADVANTAGES
from dppo_jax.errors import UserError
from dppo_jax.losses import token_kl
from dppo_jax.models.decoder import forward
from dppo_jax.models.hf import load_classifier
from dppo_jax.storage.run_log import read_scalars
from experiments import sweep
from experiments.run import checks
from experiments.run.learner import Learner
from experiments.run.reward_model import RewardModel
from tests.golden.reward_models.conversations import messages
from tests.helpers.fixtures import hurried, run, small_config, tiny
from tests.helpers.places import GOLDEN

LLAMA = GOLDEN / "reward_models" / "llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield tiny(tmp_path_factory)


def prompts_alone(folder, tmp_path):
    """The questions without their answers."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], "chosen": "x"}) + "\n" for row in rows))
    return path


def by_hand(prompt: str, reply: str, longest: int) -> float:
    """The score of one conversation, by transformers' tokens and one unpadded pass."""
    loaded = load_classifier(LLAMA)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(LLAMA)
    ids = tokenizer.apply_chat_template(messages(prompt, reply), tokenize=True, return_dict=False)[:longest]
    tokens = jnp.array([ids], jnp.int32)
    hidden = forward(loaded.config, loaded.params["body"], tokens, jnp.ones_like(tokens))[0]
    last = max(at for at, token in enumerate(ids) if token != loaded.pad_id)
    return float(hidden[last] @ loaded.params["score"])


def test_a_run_is_rewarded_by_its_model(folder, tmp_path, monkeypatch):
    """Two steps on prompts without answers; one of the lengths cuts some conversations."""
    seen, advantages = [], []
    call, learn = RewardModel.__call__, Learner.advantages

    def score(self, pairs, share):
        found = call(self, pairs, share)
        seen.append((pairs, *found))
        return found

    def learn_from(self, batch, replies):
        batch = learn(self, batch, replies)
        advantages.append(np.asarray(batch.advantages))
        return batch

    monkeypatch.setattr(RewardModel, "__call__", score)
    monkeypatch.setattr(Learner, "advantages", learn_from)
    longest = 27
    numbers = dict(reward__terms__model=0.5, reward__terms__correct=0.0, reward__model__path=str(LLAMA))
    numbers |= dict(reward__model__max_len=longest, reward__model__rows=5, data__verifier="none", steps=2)
    config = small_config(folder, data__path=str(prompts_alone(folder, tmp_path)), **numbers)
    done = run(config, tmp_path / "run")
    scalars = {tag: values.tolist() for tag, (_, values) in read_scalars(done.folder).items()}
    assert [tag for tag in scalars if tag.startswith("reward/term/")] == ["reward/term/model"] and len(seen) == 2
    for step, (pairs, scores, cut) in enumerate(seen):
        assert len(scores) == len(pairs) == 32 and len(np.unique(scores)) > 8
        for row in range(0, 32, 5):
            example, reply = pairs[row]
            assert scores[row] == pytest.approx(by_hand(example.prompt, reply, longest), abs=1e-4)
        assert scalars["reward/term/model"][step] == pytest.approx(scores.mean(), abs=1e-6)
        assert scalars["reward/mean"][step] == pytest.approx(0.5 * scores.mean(), abs=1e-6)
        assert scalars["reward/model_cut"][step] == cut > 0
        want = ADVANTAGES["group_mean"](jnp.asarray(0.5 * scores), jnp.arange(32) // 4, num_groups=8)
        np.testing.assert_allclose(advantages[step], want, atol=1e-6)
    assert "conversations have more than reward.model.max_len = 27 tokens" in done.said
    assert "data: prompts.jsonl: read as prompts (prompt: prompt; no answer is read)" in done.said
    assert [made for made in done.compilations if made[1] not in (None, 0)] == []
    # The run goes on with the same reward model alone.
    other = tmp_path / "other"
    other.mkdir()
    for file in LLAMA.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config.steps, config.reward.model.path = 3, str(other)
    assert "reward.model.path: " in run(config, tmp_path / "run").said
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + " ")
    with pytest.raises(UserError, match="the reward model in .*other is not that which this run began with; put it"):
        run(config, tmp_path / "run")


KL = {
    "k1": lambda logs: logs,
    "k2": lambda logs: logs**2 / 2,
    "k3": lambda logs: np.exp(-logs) - 1 + logs,
}


@pytest.mark.parametrize("estimator", KL)
def test_the_kl_of_a_token_is_that_of_its_definition(estimator):
    rng = np.random.default_rng(0)
    behavior, reference = (-rng.exponential(size=(6, 5)) for _ in range(2))
    mask = np.arange(5) < np.array([5, 1, 3, 0, 2, 4])[:, None]
    behavior[0, 0], reference[3, 0] = 0.0, np.nan  # the second outside the mask
    logps = (jnp.asarray(x, jnp.float32) for x in (behavior, reference))
    found = token_kl(*logps, jnp.asarray(mask), estimator=estimator)
    want = np.where(mask, KL[estimator](behavior - reference), 0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    if estimator != "k1":
        assert (np.asarray(found) >= 0).all()
    with pytest.raises(UserError, match="unknown estimator 'k4'"):
        token_kl(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1), bool), estimator="k4")


@pytest.mark.parametrize(
    ("estimator", "advantage"), [("k3", "group_mean"), pytest.param("k1", "gae", marks=pytest.mark.slow)]
)
def test_the_reward_falls_by_the_kl(folder, tmp_path, monkeypatch, estimator, advantage):
    """Of a response, for groups; of each token, with a critic."""
    seen, learn = [], Learner.advantages

    def learn_from(self, batch, replies):
        before = replies[0].shaped_rewards.copy()
        after = learn(self, batch, replies)
        estimates = getattr(self._critic, "_estimates", None)
        seen.append((jax.device_get((batch, after.advantages, estimates)), before, replies[0].shaped_rewards.copy()))
        return after

    monkeypatch.setattr(Learner, "advantages", learn_from)
    numbers = dict(reward__kl_coef=0.3, reward__kl_estimator=estimator, advantage__name=advantage, steps=2)
    config = small_config(folder, critic__lam=1.0, critic__whiten=False, **numbers)
    scalars = read_scalars(run(config, tmp_path / "run").folder)
    for step, ((batch, advantages, estimates), before, rewards) in enumerate(seen):
        logs = np.where(batch.mask, batch.behavior_logp.astype(np.float64) - batch.reference_logp, 0)
        kl = np.where(batch.mask, KL[estimator](logs), 0)
        assert (np.abs(kl).max() > 1e-3) == bool(step)  # at first the policy is the reference
        assert scalars["reward/term/kl"][1][step] == pytest.approx(kl.sum(axis=1).mean(), abs=1e-5)
        if advantage == "group_mean":
            np.testing.assert_allclose(rewards, before - 0.3 * kl.sum(axis=1), atol=1e-5)
            groups = rewards.reshape(8, 4)
            np.testing.assert_allclose(advantages.reshape(8, 4), groups - groups.mean(axis=1, keepdims=True), atol=1e-5)
        else:  # with lambda 1 a return is the sum of the rewards from there on
            np.testing.assert_array_equal(rewards, before)
            last = np.arange(batch.mask.shape[1]) == batch.mask.sum(axis=1, keepdims=True) - 1
            of_tokens = np.where(last, before[:, None], 0) - 0.3 * kl
            returns = np.where(batch.mask, np.cumsum(of_tokens[:, ::-1], axis=1)[:, ::-1], 0)
            np.testing.assert_allclose(estimates.returns, returns, atol=1e-4)


@pytest.mark.slow
def test_a_sweep_has_one_reward_model_for_all(folder, tmp_path):
    """And each run its own rewards and KL, which begin with one policy and other prompts."""
    numbers = dict(reward__terms__model=1.0, reward__model__path=str(LLAMA), reward__model__max_len=64, steps=2)
    config = small_config(folder, reward__kl_coef=0.1, checkpoint__every=0, **numbers)
    runs = [sweep.Run("dppo_binary_tv", seed, 1.0) for seed in (0, 1)]
    sweep.train(config, runs, tmp_path)
    first, second = ({tag: x for tag, (_, x) in read_scalars(tmp_path / run.folder).items()} for run in runs)
    for scalars in (first, second):
        assert scalars["reward/model_cut"].tolist() == [0, 0]
        assert abs(scalars["reward/term/kl"][0]) < 1e-4 < abs(scalars["reward/term/kl"][1])
    assert (first["reward/term/model"] != second["reward/term/model"]).all()


def changed(changes):
    config = base.get_config()
    config.policy.path, config.data.name = "x", "products"
    with config.ignore_type():
        for key, value in changes.items():
            *path, name = key.split(".")
            section = config
            for part in path:
                section = section[part]
            section[name] = value
    return config


NONE = {"data.verifier": "none", "reward.terms.correct": 0.0, "reward.terms.model": 1.0, "reward.model.path": "rm"}
REFUSED = {
    "reward.terms.model = 0.5 needs a reward model: set reward.model.path": {"reward.terms.model": 0.5},
    "reward.model.path = 'rm' is of reward.terms.model, whose weight is 0: set": {"reward.model.path": "rm"},
    "reward.model.rows = 4 is of reward.terms.model, whose weight is 0": {"reward.model.rows": 4},
    "unknown reward.model.dtype 'bfloat'; the nearest is 'bfloat16'": NONE | {"reward.model.dtype": "bfloat"},
    "reward.model.commit = 'main' is no commit, of 40 hexadecimal digits": NONE | {"reward.model.commit": "main"},
    "reward.model.max_len must be at least 1, not 0": NONE | {"reward.model.max_len": 0},
    "advantage.name = max_rl is for rewards of 0 and 1, to which reward.terms.model = 1 adds": {
        "advantage.name": "max_rl",
        "reward.terms.model": 1.0,
        "reward.model.path": "rm",
    },
    "advantage.name = max_rl is for rewards of 0 and 1, which reward.kl_coef lowers: set reward.kl_coef=0.0": {
        "advantage.name": "max_rl",
        "reward.kl_coef": 0.1,
    },
    "unknown reward.kl_estimator 'k4'": {"reward.kl_coef": 0.1, "reward.kl_estimator": "k4"},
    "reward.kl_estimator = 'k3' is of reward.kl_coef, which is 0": {"reward.kl_estimator": "k3"},
    "advantage.drop_equal is for groups of equal rewards, of which reward.kl_coef = 0.1 leaves none": {
        "reward.kl_coef": 0.1,
        "advantage.drop_equal": True,
    },
    "data.verifier = 'none' scores nothing, but reward.terms.correct = 1 weighs its score": {"data.verifier": "none"},
    "data.verifier = 'none' reads no answers, but data.extract = 'boxed': clear it": NONE | {"data.extract": "boxed"},
    "eval.sets.one.verifier = 'none' scores nothing, and its scores are all an evaluation has": {
        "eval.sets.one": base.data_section(verifier="none", name="products")
    },
}


@pytest.mark.parametrize(("sentence", "changes"), REFUSED.items(), ids=REFUSED)
def test_configs_that_cannot_be(sentence, changes):
    with pytest.raises(UserError) as error:
        checks.check(changed(changes))
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_configs_that_can_be():
    checks.check(changed(NONE | {"reward.kl_coef": 0.1, "reward.kl_estimator": "k2", "reference.coef": 0.1}))
    checks.check(changed({"data.verifier": "none", "reward.function": "own.py:score"}))
