"""The reuse regime: its model is as good as its README says, and its verifier and prompts are what they should be."""

import json
import re

import jax
import numpy as np
import pytest

from configs import reuse
from dppo_jax.data.prompts import eos_ids, load_tokenizer
from dppo_jax.data.tasks import load_task
from dppo_jax.models.hf import load_params
from dppo_jax.rewards.verifiers import last_number
from experiments.questions.reuse.make_model import CONFIG, accuracy, make_answer
from experiments.questions.reuse.make_model import slip as slip_of
from experiments.questions.reuse.task import (
    EOS,
    FIRST_OPERATION,
    MODULUS,
    NUMBERS,
    OPERATIONS,
    SIZES,
    SPELLINGS,
    STATES,
    STEPS,
    TASK,
    VOCABULARY,
    draw,
    make_tokenizer,
    rows,
    write_prompts,
)
from tests.helpers.places import ROOT

REUSE = ROOT / "assets" / "reuse"


def carry_out(prompt: str) -> int:
    """The final state of a prompt, word by word."""
    start, *operations = prompt.split()
    state = int(start[1:])
    for operation in operations:
        operand = NUMBERS.index(operation[1:])
        state = (state + operand if operation[0] == "+" else state * operand) % MODULUS
    return state


def test_the_directory_is_at_most_500_kilobytes():
    assert sum(file.stat().st_size for file in REUSE.rglob("*")) <= 5e5


@pytest.mark.slow
def test_the_model_is_as_often_right_as_the_readme_says():
    """2,048 chains of another seed: 0.04 is 3.6 standard errors."""
    config, params = load_params(REUSE)
    assert config == CONFIG
    readme = (ROOT / "experiments" / "questions" / "reuse" / "README.md").read_text(encoding="utf-8")
    stated = float(re.search(r"right ([\d.]+)% of the time when sampled", readme)[1]) / 100
    parameters = sum(x.size for x in jax.tree.leaves(params))
    assert f"{parameters:,} parameters" in readme
    assert abs(accuracy(make_answer(1.0), params, seed=77, count=2048) - stated) < 0.04
    assert accuracy(make_answer(0.0), params, seed=77, count=512) > 0.99


def test_the_config_asks_for_the_task_it_was_made_for(monkeypatch):
    monkeypatch.chdir(ROOT)
    c = reuse.get_config()
    assert (c.data.max_prompt_len, c.rollout.max_new_tokens) == (TASK.prompt_tokens, TASK.reply_tokens + 1)
    assert c.train.epochs * c.train.minibatches == 16
    for data, name in ((c.data, "train"), (c.eval.sets.held_out, "held_out")):
        task = load_task(data.kind, path=data.path, size=data.size, verifier=data.verifier)
        assert len(task.examples) == data.size == SIZES[name]


def test_131_tokens_one_for_every_word():
    tokenizer = load_tokenizer(str(REUSE))
    assert len(VOCABULARY) == len(tokenizer) == CONFIG.vocab_size == 131
    assert tokenizer(VOCABULARY)["input_ids"] == [[i] for i in range(131)]
    assert eos_ids(tokenizer, str(REUSE)) == (0,)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("answer", range(MODULUS))
def test_the_verifier_accepts_every_spelling_of_the_last_state_and_nothing_else(answer):
    tokenizer = load_tokenizer(str(REUSE))
    before = [1, 50, 104]  # states of any value
    for i, word in enumerate(VOCABULARY):
        if word in STATES:
            right = word in [f"{letter}{answer}" for letter in SPELLINGS]
            assert last_number(tokenizer.decode([*before, i]), str(answer)) == right
            assert last_number(tokenizer.decode([*before, i, FIRST_OPERATION + 5]), str(answer)) == right
        assert last_number(tokenizer.decode([i]), str(answer)) == (word in STATES and int(word[1:]) == answer)
    assert last_number("", str(answer)) == 0


def test_the_committed_prompts_are_what_the_generator_makes(tmp_path):
    write_prompts(tmp_path)
    for name, size in SIZES.items():
        text = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8")
        assert text == (REUSE / f"{name}.jsonl").read_text(encoding="utf-8")
        read = [json.loads(line) for line in text.splitlines()]
        assert len(read) == size
        assert all(int(row["answer"]) == carry_out(row["prompt"]) for row in read)


def test_no_chain_is_both_trained_and_held_out():
    seen = [{row["prompt"] for row in rows(seed, SIZES[name])} for seed, name in ((1, "train"), (2, "held_out"))]
    assert not seen[0] & seen[1]
    assert [len(prompts) for prompts in seen] == list(SIZES.values())


def test_the_generator_depends_on_its_seed_alone():
    one, same, other = (draw(np.random.default_rng(seed), 64, slip=0.5) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one.prompts, other.prompts)


def residues(tokens: np.ndarray) -> np.ndarray:
    return (tokens - 1) // len(SPELLINGS)


def test_longer_chains_are_as_long_as_asked_and_as_often_right():
    task = TASK._replace(steps=64)
    chains = draw(np.random.default_rng(5), 4000, slip_of(task), task)
    assert chains.prompts.shape == (4000, 65) and chains.replies.shape == (4000, 65)
    texts = [" ".join(VOCABULARY[token] for token in prompt) for prompt in chains.prompts]
    right = [carry_out(text) == final for text, final in zip(texts, chains.final, strict=True)]
    unslipped = (1 - slip_of(TASK)) ** STEPS
    # A slip is undone where a later *zero ends in 0 whatever came before; so often or oftener, a chain is right.
    assert unslipped - 0.03 < np.mean(right)
    assert (1 - slip_of(task)) ** 64 == pytest.approx(unslipped)


def test_pauses_stand_after_every_state_and_say_nothing():
    task = TASK._replace(pauses=6)
    chains, plain = (draw(np.random.default_rng(5), 100, 0.0, of) for of in (task, TASK))
    assert chains.replies.shape == (100, task.reply_tokens) == (100, 71)
    by_state = chains.replies[:, :-1].reshape(100, STEPS, 7)
    assert (by_state[:, :, 0] == plain.replies[:, :-1]).all() and (by_state[:, :, 1:] == len(task.vocabulary) - 1).all()
    assert (chains.prompts == plain.prompts).all() and (chains.replies[:, -1] == 0).all()
    reply = make_tokenizer(task).decode(chains.replies[0, :-1])
    assert reply.count(".") == 60 and last_number(reply, str(chains.final[0])) == 1.0


def test_replies_are_the_states_step_by_step_and_slip_as_often_as_asked():
    for slip in (0.0, 0.07):
        chains = draw(np.random.default_rng(0), 4000, slip)
        assert (chains.replies[:, -1] == VOCABULARY.index(EOS)).all()
        states = residues(np.concatenate([chains.prompts[:, :1], chains.replies[:, :-1]], axis=1))
        assert np.array_equal(states[:, -1], chains.final)
        kind, operand = np.divmod(chains.prompts[:, 1:] - FIRST_OPERATION, MODULUS)
        right = np.where(kind == 0, states[:, :-1] + operand, states[:, :-1] * operand) % MODULUS
        slipped = np.mean(right != states[:, 1:])
        assert abs(slipped - slip) < 4 * np.sqrt(slip * (1 - slip) / (4000 * STEPS)) + 1e-9


def test_start_operations_and_spellings_are_uniform():
    """Each count within five standard deviations."""
    chains = draw(np.random.default_rng(0), 20_000)
    for drawn, kinds in (
        (residues(chains.prompts[:, 0]), MODULUS),
        (chains.prompts[:, 1:] - FIRST_OPERATION, len(OPERATIONS)),
        ((chains.replies[:, :-1] - 1) % len(SPELLINGS), len(SPELLINGS)),
    ):
        counts = np.bincount(drawn.ravel(), minlength=kinds)
        assert len(counts) == kinds
        assert np.abs(counts - drawn.size / kinds).max() < 5 * np.sqrt(drawn.size / kinds)
