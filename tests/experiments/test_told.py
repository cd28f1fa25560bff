"""What a run leaves out of its data, and what its verifiers fail on, stands on stderr and in the log."""

import json
import sys
from collections import Counter

import pytest

from configs import base
from dppo_jax.evaluate import all_failed
from dppo_jax.rewards.verifiers import VERIFIERS, exact_match
from dppo_jax.storage.run_log import read_scalars
from experiments import eval, sweep
from tests.helpers.fixtures import hurried, run, small_config, tiny

LEFT_OUT = (
    "rows.jsonl: 10 examples; left out: 2 blank lines, 3 rows beyond data.size, "
    "1 prompts of more than data.max_prompt_len tokens"
)
TWICE = "rows.jsonl: 4 examples repeat an earlier one's prompt and answer, and are kept"
COUNTS = {"examples": 10, "blank": 2, "beyond_size": 3, "bad_label": 0, "skipped": 1, "duplicates": 4}
SAMPLES, STEPS, REPLIES = 2, 2, 32


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture
def rows(tmp_path):
    """Fourteen rows, two of them too long, with two blank lines between."""
    lines = [json.dumps({"prompt": f"{i % 3}+{i % 2}=", "answer": "abcabcabc2"}) for i in range(14)]
    lines[4] = lines[12] = '{"prompt": "000000001+1=", "answer": "2"}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines[:5], "", " ", *lines[5:]]) + "\n")
    return path


@pytest.fixture
def verifier(monkeypatch):
    """A row of VERIFIERS that fails as `broken["on"]` says, and counts its failures itself."""
    broken = {"on": lambda reply: True, "failed": Counter()}

    def fragile(reply, answer):
        if reply != answer and broken["on"](reply):
            broken["failed"][answer] += 1
            raise RuntimeError("this verifier is broken")
        return exact_match(reply, answer)

    monkeypatch.setitem(VERIFIERS, "fragile", fragile)
    return broken


def config(tmp_path_factory, rows, **changes):
    data = dict(path=str(rows), size=11, verifier="fragile", too_long="skip")
    c = small_config(
        tiny(tmp_path_factory), steps=STEPS, eval__every=STEPS, eval__samples=SAMPLES, eval__prompts=4,
        **{f"data__{key}": value for key, value in data.items()}, **changes,
    )  # fmt: skip
    c.eval.sets.sums = base.data_section(kind="jsonl", max_prompt_len=8, **data)
    return c


def test_a_run_and_its_evaluation(tmp_path_factory, tmp_path, rows, verifier, monkeypatch, capsys):
    c = config(tmp_path_factory, rows)
    done = run(c, tmp_path / "run")
    said, scalars = done.said.splitlines(), read_scalars(done.folder)
    assert f"data: {LEFT_OUT}" in said and f"eval.sets.sums: {LEFT_OUT}" in said
    assert f"data: {TWICE}" in said and f"eval.sets.sums: {TWICE}" in said
    for kind, count in COUNTS.items():
        for section in ("data", "eval/sums"):
            steps, values = scalars[f"{section}/{kind}"]
            assert (steps.tolist(), values.tolist()) == ([0], [count])

    # Every verifier failed: 32 replies a step; 10 questions, not the 12 rows of three batches of 4.
    assert scalars["reward/failed"][1].tolist() == [REPLIES] * STEPS
    assert scalars["eval/sums/failed"][1].tolist() == [10 * SAMPLES] * 2
    assert scalars["reward/killed"][1].tolist() == [0] * STEPS and scalars["eval/sums/killed"][1].tolist() == [0, 0]
    assert verifier["failed"].total() == REPLIES * STEPS + 10 * SAMPLES * 2
    for step, replies, where in ((0, 32, ""), (1, 32, ""), (0, 20, ", eval.sets.sums"), (2, 20, ", eval.sets.sums")):
        words = f"step {step}{where}: the verifier scored none of {replies} replies: it failed on {replies} and was"
        assert sum(line.startswith(words) for line in said) == 1

    path = tmp_path / "config.py"
    path.write_text(
        "from pathlib import Path\nfrom configs import base\nfrom tests.helpers.fixtures import small_config\n"
        f"def get_config():\n    c = small_config(Path({str(tiny(tmp_path_factory))!r}), eval__samples=2)\n"
        f"    c.eval.sets.sums = base.data_section(**{c.eval.sets.sums.to_dict()!r})\n    return c\n"
    )
    monkeypatch.setattr(sys, "argv", ["eval", f"--config={path}", f"--checkpoint={tiny(tmp_path_factory) / 'model'}"])
    capsys.readouterr()
    eval.main()
    printed = capsys.readouterr()
    assert f"eval.sets.sums: {LEFT_OUT}" in printed.err and "the verifier scored none of 20 replies" in printed.err
    assert dict(line.split() for line in printed.out.splitlines()) | {"eval/sums/length_mean": "-"} == {
        **{f"eval/sums/{name}{end}": "0" for name in ("avg", "maj", "pass@2") for end in ("", "_low", "_high")},
        "eval/sums/length_mean": "-", "eval/sums/failed": "20", "eval/sums/killed": "0", "eval/sums/refused": "0",
    }  # fmt: skip


def test_some_failures_are_counted_without_a_warning(tmp_path_factory, tmp_path, rows, verifier):
    verifier["on"] = lambda reply: "0" in reply
    done = run(config(tmp_path_factory, rows), tmp_path / "run")
    scalars = read_scalars(done.folder)
    counted = scalars["reward/failed"][1].sum() + scalars["eval/sums/failed"][1].sum()
    assert 0 < counted == verifier["failed"].total() < REPLIES * STEPS
    assert "the verifier scored none" not in done.said


def test_further_draws_count_too(tmp_path_factory, tmp_path, rows, verifier):
    """Dynamic sampling draws again as long as a group has equal rewards: here they all have."""
    done = run(config(tmp_path_factory, rows, rollout__resample=2), tmp_path / "run")
    assert read_scalars(done.folder)["reward/failed"][1].tolist() == [3 * REPLIES] * STEPS
    assert "the verifier scored none of 96 replies" in done.said


def test_a_sweep(tmp_path_factory, tmp_path, rows, verifier, capsys):
    c = config(tmp_path_factory, rows)
    c.eval.every = 0
    runs = [sweep.Run("ppo_clip", seed, 1.0) for seed in (0, 1)]
    verifier["on"] = lambda reply: True
    sweep.train(c, runs, tmp_path / "sweep")
    said = capsys.readouterr().err
    assert said.count(f"data: {LEFT_OUT}\n") == 1
    for one in runs:
        scalars = read_scalars(tmp_path / "sweep" / one.folder)
        assert {kind: scalars[f"data/{kind}"][1].tolist() for kind in COUNTS} == {k: [n] for k, n in COUNTS.items()}
        assert scalars["reward/failed"][1].tolist() == [REPLIES] * STEPS
        assert f"step 1, {one.folder}: the verifier scored none of 32 replies" in said


def test_when_a_verifier_scored_nothing():
    assert all_failed({"failed": 3, "killed": 1}, 5) is None
    assert "it failed on 3 and was killed on 1, so every reward is 0" in all_failed({"failed": 3, "killed": 1}, 4)
    assert all_failed({"failed": 0, "killed": 0}, 0) is None
    assert all_failed({"failed": 0, "killed": 0, "refused": 4}, 4) is None  # replies that cannot be answers
    assert all_failed({"failed": 1, "killed": 0, "refused": 3}, 4)
