"""Supervised fine-tuning: its loss against plain logits, runs that go on, what is learned, and bad rows."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.models import load_policy
from dppo_jax.storage.run_log import read_scalars
from experiments.sft import tune
from tests.helpers.fixtures import EOS, VOCABULARY, hurried, run, same, small_config, tiny

ROWS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "0+1=", "completion": "1 abc"},
    {"prompt": "?", "completion": "f"},
    {"prompt": "ab 1+0=", "completion": "1<eos>"},  # an end that stands there counts once
    {"prompt": [{"role": "user", "content": "2+0="}], "completion": [{"role": "assistant", "content": "2"}]},
    {"prompt": "a", "completion": 12},
]


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    shutil.copytree(tiny(tmp_path_factory) / "model", folder / "model")
    write(folder / "rows.jsonl", [row for row in ROWS if isinstance(row["prompt"], str)])
    write(folder / "held_out.jsonl", [{"prompt": "1+0=", "completion": "1"}, {"prompt": "2+0=", "completion": "2?"}])
    return folder


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, **changes):
    numbers = dict(data__path=str(folder / "rows.jsonl"), data__verifier="task", sft__batch=5, eval__every=0)
    return small_config(folder, **(numbers | dict(optimizer__learning_rate=0.01, checkpoint__every=1) | changes))


def tuned(c, folder: Path) -> str:
    """What experiments.sft says on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        tune(c, folder)
    return said.getvalue()


def direct(folder: Path, rows: list[dict]) -> tuple[float, int]:
    """The mean of -log p over the tokens of all completions, each row by itself in float64, and how many there are."""
    policy, logps = load_policy(folder), []
    for row in rows:
        prompt = [VOCABULARY[c] for c in row["prompt"]]
        completion = [VOCABULARY[c] for c in str(row["completion"]).removesuffix("<eos>")] + [EOS]
        logits = np.asarray(policy.logits(policy.params, np.array([prompt + completion]))[0], np.float64)
        logits = logits[len(prompt) - 1 : -1]
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logps += list(logp[np.arange(len(completion)), completion])
    return -float(np.mean(logps)), len(logps)


@pytest.mark.parametrize("pack", [True, False])
def test_the_loss_is_the_cross_entropy_of_completions_and_their_ends(folder, tmp_path, pack):
    """Several rows packed together; at temperature 1, whatever the rollout's."""
    rows = [row for row in ROWS if isinstance(row["prompt"], str)]
    held = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    more = dict(train__pack=pack, rollout__temperature=0.5, sft__held_out=str(folder / "held_out.jsonl"))
    tuned(config(folder, **more, checkpoint__export=True), tmp_path / "run")
    scalars = read_scalars(tmp_path / "run")
    loss, tokens = direct(folder / "model", rows)
    assert scalars["sft/tokens"][1].tolist() == [tokens] and tokens == 2 + 6 + 2 + 2 + 3
    np.testing.assert_allclose(scalars["sft/loss"][1], [loss], rtol=1e-5)
    assert scalars["sft/held_out_loss"][0].tolist() == [0, 1]
    after = [direct(path, held)[0] for path in (folder / "model", tmp_path / "run" / "policy")]
    np.testing.assert_allclose(scalars["sft/held_out_loss"][1], after, rtol=1e-5)
    assert scalars["grad_norm"][1][0] > 0 and (scalars["train/occupancy"][1] > 0.4).all() == pack


def test_a_run_goes_on_bit_for_bit(folder, tmp_path):
    more = dict(sft__batch=2, optimizer__schedule="constant", sft__held_out=str(folder / "held_out.jsonl"))
    said = tuned(config(folder, **more, sft__epochs=4), tmp_path / "whole")
    assert "compiled after the first step" not in said
    tuned(config(folder, **more, sft__epochs=4), tmp_path / "cut")
    for step in range(4, 11):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    assert "going on from the checkpoint at step 3" in tuned(config(folder, **more, sft__epochs=4), tmp_path / "cut")
    same(tmp_path / "whole", tmp_path / "cut")
    assert read_scalars(tmp_path / "cut")["sft/loss"][0].tolist() == list(range(10))
    write(folder / "other.jsonl", ROWS[:3])
    with pytest.raises(UserError, match="the prompts or answers of data are not those that this run began with"):
        tuned(config(folder, **more, sft__epochs=4, data__path=str(folder / "other.jsonl")), tmp_path / "cut")


def test_the_model_learns_its_rows_and_goes_on_from_there(folder, tmp_path):
    tuned(config(folder, sft__epochs=60, checkpoint__every=0, checkpoint__export=True), tmp_path / "sft")
    loss = read_scalars(tmp_path / "sft")["sft/loss"][1]
    assert loss[0] > 2 and loss[-1] < 0.5
    questions = dict(data__path=str(write(folder / "sums.jsonl", [{"prompt": "1+1=", "answer": 2}])))
    warm = dict(policy__path=str(tmp_path / "sft" / "policy"), steps=1, checkpoint__every=0)
    starts = {"cold": dict(steps=1, checkpoint__every=0), "warm": warm}
    runs = [run(small_config(folder, **questions, **start), tmp_path / name) for name, start in starts.items()]
    cold, warmed = (read_scalars(one.folder)["reward/mean"][1][0] for one in runs)
    assert warmed > 0.8 > cold


def test_rows_of_messages_and_of_other_columns(folder, tmp_path):
    """The assistant's last turn; GSM8K's column; what is too long is left out and told."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shutil.copytree(folder / "model", tmp_path / "chat")
    file = tmp_path / "chat" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    write(tmp_path / "chat.jsonl", [{"messages": turns}, {"messages": [*turns, turns[0], turns[1]]}, ROWS[4]])
    chat = dict(policy__path=str(tmp_path / "chat"), data__chat=True, data__path=str(tmp_path / "chat.jsonl"))
    tuned(config(folder, **chat, data__max_prompt_len=16), tmp_path / "chatting")
    assert read_scalars(tmp_path / "chatting")["sft/tokens"][1][0] == 2 + 2 + 2 + 2 + 2  # five of three rows: two again
    pairs = [("1+1=", "1+1=2"), ("a", "abcdef"), ("0" * 9, "0")]
    rows = write(tmp_path / "gsm8k.jsonl", [{"question": question, "answer": answer} for question, answer in pairs])
    of_answers = dict(data__path=str(rows), sft__column="answer", data__too_long="skip", sft__batch=1)
    said = tuned(config(folder, **of_answers), tmp_path / "answers")
    scalars = read_scalars(tmp_path / "answers")
    assert scalars["sft/tokens"][1].tolist() == [6]
    assert (scalars["data/too_long"][1][0], scalars["data/skipped"][1][0]) == (1, 1)
    assert "1 completions of more than rollout.max_new_tokens=6 tokens are left out" in said


BAD = {
    "row 1: has no column 'completion', which sft.column names; the nearest is 'completions'": [
        {"prompt": "1", "completions": "2"}
    ],
    "row 2: has no 'completion'": [ROWS[0], {"prompt": "1", "completion": None}],
    "row 1: the completion has no tokens": [{"prompt": "1", "completion": ""}],
    "row 1: 'completion' holds several texts, and a row has one completion": [
        {"prompt": "1", "completion": ["1", "2"]}
    ],
    "row 1: 'completion' must be text or a number, not {'a': 1}": [{"prompt": "1", "completion": {"a": 1}}],
    "row 1: the tokenizer has no token for 'z', so the policy would see another completion": [
        {"prompt": "1", "completion": "z"}
    ],
    "row 1: the completion ('abcdef') has 7 tokens with its end, more than rollout.max_new_tokens=6; raise it, or": [
        {"prompt": "1", "completion": "abcdef"}
    ],
    "has 9 tokens, more than data.max_prompt_len=8; raise it, or set data.too_long='skip'": [
        {"prompt": "0" * 9, "completion": "1"}
    ],
    "row 1: the data holds chat messages; set data.chat=True": [ROWS[4]],
    "row 1: 'messages' must be a list of role and content texts, not []": [
        {"messages": [{"role": "assistant", "content": "1"}]}
    ],
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_row_is_one_sentence(folder, tmp_path, sentence):
    rows = write(tmp_path / "rows.jsonl", BAD[sentence])
    with pytest.raises(UserError) as caught:
        tune(config(folder, data__path=str(rows)), tmp_path / "run")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


SETTINGS = {
    "experiments.sft reads rows of prompts and completions: set data.kind to": dict(data__kind="reasoning_gym"),
    "experiments.sft reads rows of prompts and completions: set": dict(data__kind="environment", data__name="x"),
    "sft.held_out: there is no file 'nope.jsonl'": dict(sft__held_out="nope.jsonl"),
    "data.columns.answer = 'a' is of answers: name the completion's": dict(data__columns__answer="a"),
    "sft.batch must be at least 1, not 0": dict(sft__batch=0),
    "sft.held_out = 'az://bucket/rows': az:// addresses are neither": dict(sft__held_out="az://bucket/rows"),
}


@pytest.mark.parametrize("sentence", SETTINGS)
def test_settings_that_cannot_be(folder, tmp_path, sentence):
    with pytest.raises(UserError) as caught:
        tune(config(folder, **SETTINGS[sentence]), tmp_path / "run")
    assert sentence in str(caught.value) and not (tmp_path / "run").exists()
