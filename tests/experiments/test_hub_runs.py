"""Runs whose model and data come from the hub by name: one server on loopback, the commands as users give them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fixtures import hurried_environment
from tests.helpers.hub_server import HubServer, parquet

ROOT = Path(__file__).resolve().parents[2]
TINY = {path.name: path.read_bytes() for path in (ROOT / "assets/tiny").iterdir()}
NAMES = {"policy.path": "acme/tiny", "data.kind": "hub", "data.name": "acme/sums", "data.settings": "{}"}
SMALL = {"steps": 1, "rollout.prompts": 2, "rollout.group_size": 2, "rollout.max_new_tokens": 2, "train.epochs": 1}
SMALL |= {"train.minibatches": 1, "eval.every": 0, "eval.prompts": 2, "log.histograms": 0}
HELD_OUT = {"kind": "hub", "name": "acme/sums", "split": "test", "settings": "{}", "size": 2}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return hurried_environment(tmp_path_factory)


def command(name: str, keys: dict, *arguments: str) -> list[str]:
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return [sys.executable, "-m", f"experiments.{name}", "--config", "configs/quickstart.py", *overrides, *arguments]


def run(server: HubServer, home: Path, environment, words: list[str], **more: str) -> subprocess.CompletedProcess:
    ours = {key: value for key, value in server.environment(home).items() if key.startswith("HF_")}
    ours = environment | ours | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run(words, cwd=ROOT, env=ours, capture_output=True, text=True, timeout=600)


def test_a_run_by_names_records_commits_and_goes_on_with_them_without_the_hub(tmp_path, environment):
    sets = {f"eval.sets.held_out.{key}": value for key, value in HELD_OUT.items()}
    keys, workdir = NAMES | SMALL | sets | {"lora.rank": 2, "checkpoint.export": True}, tmp_path / "run"
    shards = {f"data/train-0000{n}-of-00002.parquet": parquet(n, n + 1) for n in range(2)}
    shards["data/test-00000-of-00001.parquet"] = parquet(4, 5, 6)
    with HubServer() as server:
        model = server.push("model", "acme/tiny", TINY | {"modeling.py": b"1 / 0", "pytorch_model.bin": b"pickle"})
        data = server.push("dataset", "acme/sums", shards | {"sums.py": b"1 / 0"})
        ran = run(server, tmp_path / "hf", environment, command("train", keys, "--workdir", str(workdir)))
        assert ran.returncode == 0, ran.stderr
        assert not server.asked_for(".py") + server.asked_for(".bin") and len(server.asked_for(".safetensors")) == 1
        stored = json.loads((workdir / "config.json").read_text())
        found = [stored["policy"], stored["data"], stored["eval"]["sets"]["held_out"]]
        assert [section["commit"] for section in found] == [model, data, data]
        assert [section["revision"] for section in found] == ["", "", ""]
        adapter = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("acme/tiny", model)
        assert (workdir / "policy" / "tokenizer.json").read_bytes() == TINY["tokenizer.json"]
        # The branches go on, the run does not go with them.
        server.push("model", "acme/tiny", TINY | {"generation_config.json": b"{}"})
        server.push("dataset", "acme/sums", {"data/train-00000-of-00001.parquet": parquet(9)})
        asked = len(server.requests)
        more = keys | {"steps": 2}
        ran = run(server, tmp_path / "hf", environment, command("train", more, "--workdir", str(workdir)))
        assert ran.returncode == 0 and "going on from the checkpoint at step 1" in ran.stderr, ran.stderr
        assert server.requests[asked:] == [] and json.loads((workdir / "config.json").read_text())["steps"] == 2
        other = more | {"data.revision": "main"}
        ran = run(server, tmp_path / "hf", environment, command("train", other, "--workdir", str(workdir)))
        assert ran.returncode == 2 and "the prompts or answers of data are not those that this run" in ran.stderr
    ran = run(server, tmp_path / "hf", environment, command("eval", keys, "--checkpoint", str(workdir)))
    assert ran.returncode == 0 and "eval/held_out/avg " in ran.stdout, ran.stderr
    assert "held_out" in ran.stderr and "1 rows beyond data.size" in ran.stderr


def test_names_that_the_hub_does_not_know_are_one_sentence(tmp_path, environment):
    with HubServer() as server:
        server.push("model", "acme/tiny", TINY)
        train = command("train", NAMES | SMALL, "--workdir", str(tmp_path / "run"))
        ran = run(server, tmp_path / "hf", environment, train)
        assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1
        assert ran.stderr.startswith(f"error: {server.url} shows no data set 'acme/sums': the name may be wrong")
        words = command("train", {"policy.path": "models/tiny"}, "--workdir", str(tmp_path / "run"))
        ran = run(server, tmp_path / "hf", environment, words)
        assert ran.stderr.startswith(f"error: there is no directory 'models/tiny', and {server.url} shows no model ")
        ran = run(server, tmp_path / "hf", environment, command("train", {"policy.path": "acme/tiny"}, "--trace"))
        assert ran.returncode == 0 and "0.3 million parameters" in ran.stdout, ran.stderr
        assert not server.asked_for(".safetensors")
