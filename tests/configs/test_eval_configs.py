"""The benchmarks of configs/eval, with rows in their published shapes, from a hub on loopback."""

import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dppo_jax.storage.results import about_of, read_table
from experiments.run.cli import load_config
from tests.helpers.fixtures import hurried_environment
from tests.helpers.hub_server import HubServer
from tests.helpers.places import ROOT

PROBLEMS = ["Find $x$ if $x+3=76$.", "What is $1+1$?", "Compute $10-3$."]
TINY = {path.name: path.read_bytes() for path in (ROOT / "assets/tiny").iterdir()}


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def head(split: str, path: str) -> bytes:
    """README.md as the two of math-ai begin."""
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {path}\n---\n".encode()


BESIDE = {"solution": "So \\boxed{it}.", "url": "https://artofproblemsolving.com", "year": "2024"}
AIME_2024 = [  # three digits, as AIME writes its answers
    {"id": 60 + n, "problem": PROBLEMS[n], "answer": answer, **BESIDE} for n, answer in enumerate(("073", "002", "007"))
]
AIME_2025 = [{"problem": PROBLEMS[n], "answer": answer, "id": str(n)} for n, answer in enumerate(("73", "2", "7"))]
AMC = [
    {"id": n, "answer": answer, "url": BESIDE["url"], "question": PROBLEMS[n]}
    for n, answer in enumerate(("73", "2.0", "7"))
]
MATH_500 = [
    {"problem": PROBLEMS[n], "solution": "So \\boxed{it}.", "answer": answer, "subject": "Precalculus"}
    | {"level": n + 1, "unique_id": f"test/precalculus/{n}.json"}
    for n, answer in enumerate(("73", "\\left( 3, \\frac{\\pi}{2} \\right)", "p - q"))
]
# By config: the data set, its files, and the labels that its rows have.
SETS = {
    "aime_2024": ("HuggingFaceH4/aime_2024", {"data/train-00000-of-00001.parquet": parquet(AIME_2024)}, AIME_2024),
    "aime_2025": (
        "math-ai/aime25", {"README.md": head("test", "test.jsonl"), "test.jsonl": lines(AIME_2025)}, AIME_2025,
    ),
    "amc": ("math-ai/amc23", {"test-00000-of-00001.parquet": parquet(AMC)}, AMC),
    "math_500": ("HuggingFaceH4/MATH-500", {"test.jsonl": lines(MATH_500)}, MATH_500),
}  # fmt: skip
LOAD = """
import json, sys
from dppo_jax.data.tasks import load_task
found = {}
for tag, arguments in json.loads(sys.argv[1]).items():
    task = load_task("hub", **arguments)
    found[tag] = [[example.prompt, example.answer] for example in task.examples], task.remarks
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        for name, files, _ in SETS.values():
            server.push("dataset", name, files)
        server.push("model", "acme/tiny", {"config.json": b"{}"})
        server.push("model", "acme/tiny", TINY, ref="v2")
        yield server


def loaded(tag: str):
    config = load_config(f"configs/eval/{tag}.py", [])
    assert list(config.eval.sets) == [tag]
    return config, config.eval.sets[tag]


def test_every_benchmark_is_here():
    names = {path.stem for path in (ROOT / "configs/eval").glob("*.py")} - {"__init__"}
    assert names == set(SETS)


def test_each_reads_its_rows_as_they_are_published(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = {}
    for tag in SETS:
        config, data = loaded(tag)
        assert data.chat and data.verifier == "math_verify" and "\\boxed{}" in data.template
        assert (config.eval.temperature, config.eval.top_p) == (0.6, 0.95)
        assert config.eval.max_new_tokens + data.max_prompt_len == 32_768
        asked[tag] = {key: data[key] for key in ("name", "subset", "split", "verifier")}
    environment = hub.environment(tmp_path, PYTHONPATH=str(ROOT))
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(asked)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    for tag, (examples, remarks) in json.loads(ran.stdout).items():
        rows = SETS[tag][2]
        assert examples == [[row.get("problem", row.get("question")), row["answer"]] for row in rows], tag
        assert len(remarks) == 1 and remarks[0].startswith("read as ")


def test_one_is_evaluated_with_a_model_of_the_hub(hub, tmp_path, tmp_path_factory):
    """The embedded model has no chat template and 256 positions."""
    small = {"eval.sets.aime_2024.chat": False, "eval.sets.aime_2024.max_prompt_len": 128, "eval.max_new_tokens": 6}
    small |= {"eval.samples": 2, "eval.prompts": 2}
    out = tmp_path / "results.parquet"
    command = [sys.executable, "-m", "experiments.eval", "--config", "configs/eval/aime_2024.py", "--policy"]
    command += ["acme/tiny@v2", f"--results={out}", *(f"--config.{key}={value}" for key, value in small.items())]
    ours = {key: value for key, value in hub.environment(tmp_path / "hf").items() if key.startswith("HF_")}
    environment = hurried_environment(tmp_path_factory) | ours | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    printed = dict(line.split() for line in ran.stdout.splitlines())
    assert {"eval/aime_2024/avg", "eval/aime_2024/maj_high", "eval/aime_2024/pass@2_low"} <= printed.keys()
    rows, about = read_table(out).to_pylist(), about_of(out)
    policy, data = about["policy"], about["config"]["eval"]["sets"]["aime_2024"]
    assert [row["answers"] for row in rows[::2]] == [["073"], ["002"], ["007"]] and len(rows) == 6
    assert (policy["path"], policy["commit"]) == ("acme/tiny", hub.refs["model", "acme/tiny"]["v2"])
    assert data["commit"] == hub.refs["dataset", data["name"]]["main"]
