"""The command eval: policies without a run, its own length, and results that a kill does not cost."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from configs import base
from dppo_jax.errors import UserError
from dppo_jax.models import load_params, save_hf
from dppo_jax.rewards.extract import NUMBER
from dppo_jax.rewards.verifiers import last_number
from dppo_jax.storage.results import SCHEMA, about_of, read_table
from experiments import eval
from tests.helpers.fixtures import TINY, finished_run, hurried, hurried_environment, small_config, tiny, tokenizer
from tests.helpers.kills import killed_after
from tests.helpers.places import ROOT

SAMPLES, QUESTIONS = 3, 18


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return folder / "model"


def config(folder: Path, prompts: int = 4, **changes):
    """Two sets, one of chat messages that the first would refuse; responses longer than training's."""
    numbers = dict(eval__samples=SAMPLES, eval__prompts=prompts, eval__max_new_tokens=9, eval__temperature=1.0)
    c = small_config(folder, **(numbers | changes))
    data = dict(kind="jsonl", path=c.data.path, verifier="last_number", max_prompt_len=8)
    c.eval.sets.sums = base.data_section(**data)
    c.eval.sets.tail = base.data_section(**data, size=3)
    return c


@pytest.fixture(scope="module")
def whole(folder, model, tmp_path_factory):
    """An evaluation that nobody disturbed: its file and its metrics."""
    path = tmp_path_factory.mktemp("whole") / "results.parquet"
    return path, eval.evaluate(config(folder), policy_name=str(model), results=path)


def test_results_hold_every_sample_and_say_of_what(whole, folder, model):
    path, metrics = whole
    table = read_table(path)
    assert table.schema.remove_metadata() == SCHEMA and not path.with_name(f"{path.name}.parts").exists()
    rows = table.to_pylist()
    asked = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    places = [("sums", q, s) for q in range(QUESTIONS) for s in range(SAMPLES)]
    places += [("tail", q, s) for q in range(3) for s in range(SAMPLES)]
    assert [(row["set"], row["question"], row["sample"]) for row in rows] == places
    for row in rows:
        question = asked[row["question"]]
        assert (row["prompt"], row["answers"]) == (question["prompt"], [str(question["answer"])])
        assert row["reward"] == last_number(row["reply"], row["answers"][0]) and row["outcome"] == "scored"
        assert row["extracted"] == (NUMBER.findall(row["reply"]) or [None])[-1]
        written = len(row["reply"].replace("<pad>", "_"))  # a token a character
        assert row["length"] == written + (not row["truncated"])  # and the end
    assert max(row["length"] for row in rows) == 9 > small_config(folder).rollout.max_new_tokens
    of_sums = np.array([row["reward"] for row in rows if row["set"] == "sums"])
    assert metrics["eval/sums/avg"] == pytest.approx(of_sums.mean()) and 0 < of_sums.mean() < 1
    about = about_of(path)
    assert about["config"]["eval"]["samples"] == SAMPLES and about["policy"]["path"] == str(model)
    assert about["policy"]["fingerprint"] and about["versions"]["jax"]


def test_without_a_file_and_with_a_finished_one_the_numbers_are_the_same(whole, folder, model, capsys):
    path, metrics = whole
    assert eval.evaluate(config(folder), model) == metrics  # a model directory may also be a --checkpoint
    assert eval.evaluate(config(folder, steps=9, eval__every=2), policy_name=str(model), results=path) == metrics
    assert f"{path} has all samples: nothing is drawn" in capsys.readouterr().err


def test_a_killed_evaluation_goes_on_with_what_is_missing(folder, model, tmp_path, tmp_path_factory, capsys):
    paths = [tmp_path / f"{name}.parquet" for name in ("whole", "killed")]
    changes = dict(eval__samples=2, eval__prompts=1, eval__max_new_tokens=9)
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.experiments.test_eval import config\n"
        f"def get_config():\n    return config(Path({str(folder)!r}), **{changes | {'prompts': 1}!r})\n"
    )
    asked = config(folder, **changes)
    metrics = eval.evaluate(asked, policy_name=str(model), results=paths[0])
    command = [sys.executable, "-m", "experiments.eval", f"--config={file}", f"--policy={model}"]
    parts = paths[1].with_name("killed.parquet.parts")
    environment = hurried_environment(tmp_path_factory) | {"PYTHONPATH": str(ROOT)}
    killed_after(3, [*command, f"--results={paths[1]}"], parts, environment)
    left = len(list(parts.glob("*.parquet")))
    assert 3 <= left < QUESTIONS + 3 and not paths[1].exists()
    newest = max(parts.glob("*.parquet"))
    (parts / f"{newest.name}.part").write_bytes(newest.read_bytes()[:100])  # half of one, as a kill may leave
    capsys.readouterr()
    assert eval.evaluate(asked, policy_name=str(model), results=paths[1]) == metrics
    said = capsys.readouterr().err
    assert f"eval.sets.sums: {min(left, QUESTIONS)} of {QUESTIONS} batches are in {parts}, and are not" in said
    one, two = map(read_table, paths)
    assert one.replace_schema_metadata() == two.replace_schema_metadata() and not parts.exists()


@pytest.fixture(scope="module")
def other_model(model, tmp_path_factory) -> Path:
    """Of other weights alone."""
    path = tmp_path_factory.mktemp("other") / "model"
    _, params = load_params(model)
    save_hf(path, TINY, params | {"final_norm": params["final_norm"] * 2}, tokenizer())
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(eval__temperature=0.5), "is of another config: eval.temperature was 1.0 and is now 0.5; put that back"),
        (dict(seed=3), "is of another config: seed was 0 and is now 3; put that back, or name another file"),
        (dict(rollout__dtype="bfloat16"), "is of another config: rollout.dtype was 'float32' and is now 'bfloat16'"),
        ("policy", "is of another policy: "),
        ("data", "is of other data: the prompts or answers of eval.sets.tail were others"),
        ("set", "is of another config: eval.sets was sums, tail and is now sums; put that back"),
    ],
    ids=str,
)
@pytest.mark.parametrize("unfinished", [False, True], ids=["whole", "parts"])
def test_a_file_of_other_samples_is_refused(whole, folder, model, other_model, changes, sentence, unfinished, tmp_path):
    path, policy = shutil.copy(whole[0], tmp_path / "results.parquet"), model
    if unfinished:
        path.with_name(f"{path.name}.parts").mkdir()
        (path.with_name(f"{path.name}.parts") / "about.json").write_text(json.dumps(about_of(path)))
        path.unlink()
    asked = config(folder, **(changes if isinstance(changes, dict) else {}))
    if changes == "policy":
        policy = other_model
    if changes == "data":
        lines = (folder / "questions.jsonl").read_text().splitlines()
        (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:2], '{"prompt": "1+1=", "answer": 2}']))
        asked.eval.sets.tail.path = str(tmp_path / "rows.jsonl")
    if changes == "set":
        del asked.eval.sets["tail"]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as refused:
        eval.evaluate(asked, policy_name=str(policy), results=path)
    assert str(refused.value).startswith(f"{path} {sentence}") and "\n" not in str(refused.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_file_is_of_one_step_of_a_run(tmp_path, tmp_path_factory):
    finished, path = finished_run(tmp_path_factory), tmp_path / "results.parquet"
    metrics = eval.evaluate(finished.config, finished.folder, results=path)
    assert about_of(path)["policy"]["checkpoint"] == str(finished.folder / "checkpoints" / "4")
    assert eval.evaluate(finished.config, finished.folder / "checkpoints" / "4", results=path) == metrics
    with pytest.raises(UserError, match="is of another policy: .*/checkpoints/4, and this is .*/checkpoints/2; put"):
        eval.evaluate(finished.config, finished.folder / "checkpoints" / "2", results=path)


def test_a_strangers_file_is_not_touched(folder, model, tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1="]}), path)
    with pytest.raises(UserError, match="rows.parquet is there and is no file of this command: name another$"):
        eval.evaluate(config(folder), policy_name=str(model), results=path)
    with pytest.raises(UserError, match="rows.csv: the file's name must end in .parquet$"):
        eval.evaluate(config(folder), policy_name=str(model), results=tmp_path / "rows.csv")
    assert pyarrow.parquet.read_table(path).num_rows == 1


def test_a_damaged_part_is_named(whole, folder, model, tmp_path):
    path = tmp_path / "results.parquet"
    parts = tmp_path / "results.parquet.parts"
    parts.mkdir()
    (parts / "about.json").write_text(json.dumps(about_of(whole[0])))
    (parts / "sums-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="sums-000001.parquet cannot be read as parquet: .*; delete it, and what it"):
        eval.evaluate(config(folder), policy_name=str(model), results=path)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({}, "--checkpoint DIR, of a run, and --policy DIR_OR_HUB, a model, are both missing: give one"),
        (dict(checkpoint=Path("runs/a"), policy_name="assets/tiny"), "are both given: leave one out"),
        (dict(policy_name="acme/tiny@"), "names no revision after its @; write acme/tiny, or acme/tiny@REVISION"),
        (dict(policy_name="no_dir"), "--policy: there is no directory 'no_dir', and it is no name ORG/NAME on the hub"),
    ],
)
def test_policies_that_are_none(folder, named, sentence):
    with pytest.raises(UserError) as refused:
        eval.evaluate(config(folder), **named)
    assert str(refused.value).endswith(sentence) and "\n" not in str(refused.value)
