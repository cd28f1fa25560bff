"""A training set of what a policy solves sometimes: from the embedded model, killed, and gone on with."""

import json
import sys

import numpy as np
import pytest

from dppo_jax.data.examples import Example
from dppo_jax.data.rows import load_parquet
from dppo_jax.data.shares import choose, table_of
from dppo_jax.errors import UserError
from dppo_jax.storage.results import about_of, read_table, write_table
from experiments.build_sanity_set import build
from experiments.run.cli import load_config
from tests.helpers.fixtures import hurried, hurried_environment
from tests.helpers.kills import killed_after
from tests.helpers.places import ROOT

SAMPLES = 4
SUMS = [f"{a} + {b} =" for a in (1, 4, 7) for b in (2, 5, 8)] + [f"{a} + {a} + {a} + {a} =" for a in (3, 9)]


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


def asked(path) -> list[str]:
    rows = [{"question": text, "answer": str(eval(text.rstrip("="))), "level": n} for n, text in enumerate(SUMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.kind": "jsonl", "data.path": str(path), "data.settings": "{}", "data.max_prompt_len": 16}
    changes |= {"eval.prompts": 1, "eval.max_new_tokens": 8, "compile_cache": "", "label_cache": ""}
    return [f"--config.{key}={value}" for key, value in changes.items()]


def test_a_set_that_was_killed_on_the_way_is_the_undisturbed_one(tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    overrides = asked(tmp_path / "rows.jsonl")
    config = load_config("configs/quickstart.py", overrides)
    bounds = dict(samples=SAMPLES, low=0.25, high=0.75)
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    chosen = build(config, "assets/tiny", **bounds, out=whole)
    said = capsys.readouterr().out
    assert said == (
        f"{whole}: {len(chosen.kept)} of {len(SUMS)} problems kept; {chosen.too_hard} too hard (a share below 0.25), "
        f"{chosen.too_easy} too easy (above 0.75)\n"
    )
    command = [sys.executable, "-m", "experiments.build_sanity_set", "--config=configs/quickstart.py", *overrides]
    command += ["--policy=assets/tiny", f"--samples={SAMPLES}", "--low=0.25", "--high=0.75", f"--out={killed}"]
    environment = hurried_environment(tmp_path_factory) | {"PYTHONPATH": str(ROOT)}
    killed_after(2, command, tmp_path / "killed.results.parquet.parts", environment)
    assert not killed.exists()
    build(config, "assets/tiny", **bounds, out=killed)
    assert read_table(whole).equals(read_table(killed))

    rewards = read_table(tmp_path / "killed.results.parquet")["reward"].to_numpy().reshape(-1, SAMPLES)
    shares = rewards.mean(axis=1)
    assert 0 < len(chosen.kept) < len(SUMS)
    assert chosen.kept.tolist() == [number for number, share in enumerate(shares) if share in (0.25, 0.5, 0.75)]
    rows = read_table(killed).to_pylist()
    assert [(row["prompt"], row["level"], row["share"]) for row in rows] == [
        (SUMS[n], n, shares[n]) for n in chosen.kept.tolist()
    ]
    about = about_of(killed)
    made = about["sanity_set"]
    assert (made["samples"], made["low"], made["high"], made["kept"]) == (SAMPLES, 0.25, 0.75, len(rows))
    assert made["kept"] + made["too_easy"] + made["too_hard"] == len(SUMS) == made["data"]["examples"]
    assert about["policy"]["path"] == "assets/tiny" and about["config"]["data"]["verifier"] == "last_number"
    task = load_parquet(name=None, path=str(killed), settings={}, size=None, seed=0, verifier="last_number")
    assert [(e.prompt, e.answer) for e in task.examples] == [(row["prompt"], row["answer"]) for row in rows]

    # The replies serve other bounds too; bounds that nothing is within say so.
    capsys.readouterr()
    others = dict(samples=SAMPLES, results=tmp_path / "whole.results.parquet")
    every = build(config, "assets/tiny", **others, low=0, high=1, out=tmp_path / "all.parquet")
    assert len(every.kept) == len(SUMS) and "nothing is drawn" in capsys.readouterr().err
    with pytest.raises(UserError, match="^no problem is within the bounds: 0 of 11 problems kept; .* for other"):
        build(config, "assets/tiny", **others, low=0.01, high=0.02, out=tmp_path / "no.parquet")
    assert not (tmp_path / "no.parquet").exists()
    with pytest.raises(UserError, match="whole.parquet was made with --low 0.25, not 0.5: name another --out$"):
        build(config, "assets/tiny", samples=SAMPLES, low=0.5, high=0.75, out=whole)


@pytest.mark.parametrize(
    ("override", "arguments", "sentence"),
    [
        ("--config.data.verifier=task", {}, "data.verifier = 'task' is the scorer of a generated data set, which rows"),
        ("", dict(low=0.9, high=0.1), "--low 0.9 is above --high 0.1: no problem could be kept"),
        ("", dict(out="rows.csv"), "the file's name must end in .parquet"),
        ("", dict(results="rows.parquet"), "--out and --results are both"),
    ],
)
def test_what_could_not_end_well_is_refused_before_it_begins(override, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/quickstart.py", [override] if override else [])
    given = dict(samples=2, low=0.1, high=0.9, out="rows.parquet") | arguments
    given |= {key: tmp_path / given[key] for key in ("out", "results") if key in given}
    with pytest.raises(UserError, match=sentence):
        build(config, "assets/tiny", **given)
    assert list(tmp_path.iterdir()) == []


def test_bounds_are_inclusive():
    chosen = choose(np.array([0, 1, 3, 9, 10]) / 10, 0.1, 0.9)
    assert (chosen.kept.tolist(), chosen.too_hard, chosen.too_easy) == ([1, 2, 3], 1, 1)


def test_rows_keep_what_theirs_held_and_say_what_changed(tmp_path):
    talk = ({"role": "user", "content": "1+1="},)
    examples = [
        Example("2+2=", "4", {"share": 1, "level": 3, "tags": ["a"], "empty": {}, "mixed": 1}),
        Example(talk, "2", {"level": None, "messages": "m", "mixed": "x"}, also=("two",)),
    ]
    table, remarks = table_of(examples, np.array([0.5, 0.25]))
    write_table(tmp_path / "rows.parquet", table)
    found = read_table(tmp_path / "rows.parquet").to_pylist()
    assert found == [
        {"prompt": "2+2=", "messages": None, "answer": ["4"], "share": 0.5, "original_share": 1, "level": 3,
         "tags": ["a"], "empty": "{}", "mixed": "1", "original_messages": None},
        {"prompt": None, "messages": [dict(talk[0])], "answer": ["2", "two"], "share": 0.25, "original_share": None,
         "level": None, "tags": None, "empty": None, "mixed": '"x"', "original_messages": "m"},
    ]  # fmt: skip
    assert remarks == [
        "the column 'share' is 'original_share' here",
        "the column 'messages' is 'original_messages' here",
        "the column 'empty', whose values are of several kinds, is JSON text here",
        "the column 'mixed', whose values are of several kinds, is JSON text here",
    ]
    task = load_parquet(
        name=None, path=str(tmp_path / "rows.parquet"), settings={}, size=None, seed=0, verifier="exact_match"
    )
    assert [(e.prompt, e.labels) for e in task.examples] == [("2+2=", ("4",)), (talk, ("2", "two"))]
