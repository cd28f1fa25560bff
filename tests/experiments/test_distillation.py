"""Distillation: the teacher's pass against its plain logits, runs without a verifier, and what is refused."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dppo_jax import packing
from dppo_jax.errors import UserError
from dppo_jax.losses import required_fields
from dppo_jax.models import load_policy, save_hf
from dppo_jax.storage.run_log import read_scalars
from dppo_jax.types import TrainBatch
from experiments import sweep
from experiments.run.load import load_setup
from experiments.run.runs import Runs
from experiments.run.setup import Setup
from experiments.run.teacher import Teacher
from tests.helpers.fixtures import TINY, hurried, random_params, run, same, small_config, tiny, tokenizer

# Another model of the same tokens: fewer layers and another width, and rows that no token has.
MODEL = dataclasses.replace(TINY, num_layers=1, hidden_size=16, vocab_size=TINY.vocab_size + 5)


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model/, teacher/, and prompts.jsonl, which has no answers."""
    folder = tmp_path_factory.mktemp("distillation")
    shutil.copytree(tiny(tmp_path_factory) / "model", folder / "model")
    save_hf(folder / "teacher", MODEL, random_params(3, MODEL), tokenizer())
    rows = [{"prompt": f"{pad}{a}+{b}="} for pad in ("", "?", "ab ") for a in range(3) for b in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, **changes):
    numbers = dict(loss__name="distill", data__verifier="none", optimizer__learning_rate=0.01)
    paths = dict(teacher__path=str(folder / "teacher"), data__path=str(folder / "prompts.jsonl"))
    return small_config(folder, **(numbers | paths | changes))


def scored(folder: Path, **changes) -> tuple[TrainBatch, Setup]:
    """Random prompts and responses in rows of several, with what the teacher says of them."""
    draw = np.random.default_rng(0)
    rows, prompt_length, length = 8, 8, 6
    prompts, lengths = draw.integers(1, prompt_length + 1, rows), draw.integers(1, length + 1, rows)
    zeros = np.zeros((rows, length), np.float32)
    batch = TrainBatch(
        draw.integers(2, TINY.vocab_size, (rows, prompt_length)).astype(np.int32),
        np.arange(prompt_length) >= prompt_length - prompts[:, None],
        draw.integers(1, TINY.vocab_size, (rows, length)).astype(np.int32),
        np.arange(length) < lengths[:, None],
        zeros,
        zeros[:, 0],
    )
    with contextlib.ExitStack() as stack:
        setup = load_setup(config(folder, **changes), stack)
        teacher = Teacher(Runs([setup]))
        teacher.load()
        plan = packing.plan(np.arange(rows), prompts, lengths, setup.pack_shape)
        assert len(set(plan.rows)) < rows, "a packed row of two samples"
        return jax.device_get(teacher.score(batch, plan)), setup


@pytest.mark.parametrize(("dtype", "temperature", "far"), [("float32", 1.0, 1e-5), ("bfloat16", 0.7, 0.1)])
def test_the_teacher_scores_what_was_drawn(folder, dtype, temperature, far):
    """Against its logits, each sample in a row of its own, at the rollout's temperature."""
    batch, setup = scored(folder, teacher__dtype=dtype, rollout__temperature=temperature)
    policy = load_policy(folder / "teacher")
    assert setup.teacher is not None and setup.teacher.model == policy.config
    for row in range(len(batch.tokens)):
        prompt, reply = batch.prompt_tokens[row][batch.prompt_mask[row]], batch.tokens[row][batch.mask[row]]
        logits = np.asarray(policy.logits(policy.params, np.concatenate([prompt, reply])[None])[0], np.float64)
        logits = logits[len(prompt) - 1 : -1] / temperature
        largest = logits.max(axis=1, keepdims=True)
        logp = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(
            batch.teacher_logp[row][batch.mask[row]], logp[np.arange(len(reply)), reply], rtol=0, atol=far
        )
    assert (batch.teacher_logp[~batch.mask] == 0).all()


@pytest.fixture(scope="module")
def distilled(folder, tmp_path_factory) -> Path:
    return run(config(folder, steps=16), tmp_path_factory.mktemp("runs") / "whole").folder


def test_the_policy_comes_nearer_without_a_verifier(distilled):
    scalars = read_scalars(distilled)
    kl = scalars["distill/kl"][1]
    assert kl[-4:].mean() < 0.6 * kl[:4].mean(), kl
    assert (scalars["reward/mean"][1] == 0).all() and (scalars["distill/masked"][1] < 1).all()


def test_a_run_goes_on_bit_for_bit_with_its_teacher_and_no_other(distilled, folder, tmp_path):
    run(config(folder, steps=12), tmp_path / "cut")
    shutil.copytree(folder / "teacher", tmp_path / "moved")
    run(config(folder, steps=16, teacher__path=str(tmp_path / "moved")), tmp_path / "cut")
    same(distilled, tmp_path / "cut")
    save_hf(tmp_path / "moved", MODEL, random_params(4, MODEL), tokenizer())
    with pytest.raises(UserError, match="the teacher in .*moved' is not the one that this run began with; put it back"):
        run(config(folder, steps=18, teacher__path=str(tmp_path / "moved")), tmp_path / "cut")


@pytest.mark.slow
def test_a_sweep_distils_beside_a_loss_of_rewards(distilled, folder, tmp_path):
    length = dict(reward__terms__correct=0.0, reward__terms__length=1.0, reward__overlong_buffer=4)
    c = config(folder, steps=2, **length)  # what the other loss learns from
    runs = [sweep.Run("distill", 0, 1.0), sweep.Run("cispo", 0, 1.0)]
    sweep.train(c, runs, tmp_path / "sweep")
    found, other = (read_scalars(tmp_path / "sweep" / one.folder) for one in runs)
    want = read_scalars(distilled)
    np.testing.assert_allclose(found["distill/kl"][1], want["distill/kl"][1][:2], rtol=1e-4)
    assert "distill/kl" not in other


def test_no_reward_and_no_advantage_is_looked_at(folder):
    loss = Setup(config(folder)).loss
    assert required_fields(loss, ("advantages", "teacher_logp")) == {"teacher_logp"}


def other_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"?"', '"!"'))


REFUSED = {
    "loss 'distill' needs a teacher: set teacher.path": dict(teacher__path=""),
    "loss 'distill' needs a teacher: ": dict(loss__name="cispo", log__regions=("distill",), teacher__path=""),
    "model directory /no/teacher does not exist": dict(teacher__path="/no/teacher"),
    "teacher.path = 'hdfs://node/x': hdfs:// addresses are neither": dict(teacher__path="hdfs://node/x"),
    "teacher.revision = 'v1' is of a model on the hub, and teacher.path = ": dict(teacher__revision="v1"),
    "teacher.revision = 'v1' is of teacher.path, which is empty": dict(
        loss__name="cispo", data__verifier="last_number", teacher__path="", teacher__revision="v1"
    ),
    "unknown teacher.dtype 'float8'; the nearest is 'float": dict(teacher__dtype="float8"),
    "data.verifier = 'none' scores nothing, but reward.terms.correct = 1 weighs its score, and loss 'cispo'": dict(
        loss__name="cispo"
    ),
    "advantage.drop_equal leaves out groups of equal rewards, which all are with": dict(advantage__drop_equal=True),
}


@pytest.mark.parametrize(("sentence", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be(folder, sentence, changes):
    with pytest.raises(UserError) as caught, contextlib.ExitStack() as stack:
        load_setup(config(folder, **changes), stack)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


TEACHERS = {
    "has another vocabulary: token 9 is '?' of the policy and '!' of the teacher": (MODEL, other_tokens),
    "has a vocab_size of 16, less than the policy's 18": (dataclasses.replace(MODEL, vocab_size=16), None),
    "rollout.max_new_tokens = 14 tokens, more than the 9 positions": (dataclasses.replace(MODEL, max_position=9), None),
}


@pytest.mark.parametrize("sentence", TEACHERS)
def test_a_teacher_that_cannot_score(folder, tmp_path, sentence):
    model, change = TEACHERS[sentence]
    save_hf(tmp_path / "teacher", model, random_params(3, model), tokenizer())
    if change:
        change(tmp_path / "teacher")
    student = {}
    if "vocab_size" in sentence:
        wider = dataclasses.replace(TINY, vocab_size=18)
        save_hf(tmp_path / "model", wider, random_params(3, wider), tokenizer())
        student = dict(policy__path=str(tmp_path / "model"))
    with pytest.raises(UserError) as caught, contextlib.ExitStack() as stack:
        load_setup(config(folder, teacher__path=str(tmp_path / "teacher"), **student), stack)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
