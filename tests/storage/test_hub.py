"""Models and data sets by name, through the real client, from a server on loopback that speaks the hub's protocol."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage import hub
from tests.helpers.hub_server import HubServer, parquet

ROOT = Path(__file__).resolve().parents[2]
TINY = {path.name: path.read_bytes() for path in (ROOT / "assets/tiny").iterdir()}
CALL = """
import json, sys
from dppo_jax.errors import UserError
from dppo_jax.storage import hub
function, *arguments = json.loads(sys.argv[1])
try:
    found = getattr(hub, function)(*arguments)
    print(json.dumps([[str(path) for path in found[0]] if isinstance(found[0], list) else str(found[0]), found[1]]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def call(server: HubServer, home: Path, function: str, *arguments: str, **environment: str):
    """What a function of `hub` returns or refuses, in a process of its own: the client reads its settings at import."""
    ours = server.environment(home, PYTHONPATH=str(ROOT), **environment)
    command = [sys.executable, "-c", CALL, json.dumps([function, *arguments])]
    ran = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def test_a_model_is_fetched_once_without_code_and_pickles_and_read_offline_afterwards(tmp_path):
    others = {"pytorch_model.bin": b"pickle", "modeling.py": b"1 / 0", "onnx/model.safetensors": b"", "notes.md": b""}
    with HubServer() as server:
        commit = server.push("model", "acme/tiny", TINY | others)
        folder, found = call(server, tmp_path, "model_directory", "acme/tiny")
        assert found == commit and {path.name: path.read_bytes() for path in Path(folder).iterdir()} == TINY
        assert sorted(line.rpartition("/")[2] for line in server.requests if line.startswith("HEAD")) == sorted(TINY)
        assert not server.asked_for(".bin") + server.asked_for(".py")
        asked = len(server.requests)
        assert call(server, tmp_path, "model_directory", "acme/tiny") == [folder, commit]
        assert server.requests[asked:] == ["GET /api/models/acme/tiny"]
        assert call(server, tmp_path, "model_directory", "acme/tiny", commit) == [folder, commit]
        assert call(server, tmp_path, "model_directory", "acme/tiny", HF_HUB_OFFLINE="1") == [folder, commit]
        assert len(server.requests) == asked + 1
    assert call(server, tmp_path, "model_directory", "acme/tiny") == [folder, commit]
    assert call(server, tmp_path, "model_directory", "acme/tiny", commit) == [folder, commit]
    said = call(server, tmp_path, "model_directory", "acme/other")
    assert said.startswith(f"{server.url} cannot be reached (") and "'acme/other' is in the cache, " in said
    said = call(server, tmp_path, "model_directory", "acme/other", HF_HUB_OFFLINE="1")
    assert said.startswith("not all of the model 'acme/other' is in the cache") and "HF_HUB_OFFLINE is set" in said


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, tmp_path):
    old = server.push("model", "acme/tiny", TINY, ref="v1")
    template = {"additional_chat_templates/tools.jinja": b"{{ messages }}"}
    new = server.push("model", "acme/tiny", TINY | template | {"other/tools.jinja": b""})
    commits = [call(server, tmp_path, "model_directory", "acme/tiny", ref)[1] for ref in ("", "main", "v1", old)]
    assert commits == [new, new, old, old]
    folder = Path(call(server, tmp_path, "model_directory", "acme/tiny")[0])
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jinja")) == list(template)


@pytest.mark.parametrize(
    ("files", "change", "sentence"),
    [
        (None, {}, "shows no model 'acme/it': the name may be wrong, or it is private, and HF_TOKEN must be"),
        (TINY, {"private": {"acme/it"}}, "shows no model 'acme/it': the name may be wrong"),
        (TINY, {"gated": {"acme/it"}}, "the model 'acme/it' is gated: accept its terms on http://127"),
        (TINY, {"token": "bad"}, "does not know the token that the model 'acme/it' was asked for with: set HF_TOKEN"),
        (TINY, {"revision": "v9"}, "the model 'acme/it' on the hub has no revision 'v9': give a branch"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b"x"},
            {},
            "on the hub has no model.safetensors, nor shards of it; it has 'config.json', 'pytorch_model.bin'",
        ),
        (TINY, {"short": {"tokenizer.json"}}, "the model 'acme/it' was not fetched whole (Consistency check failed: "),
        (TINY, {"short": {"model.safetensors"}}, "should be of size 1346280 but has size 673140 "),
    ],
)
def test_what_cannot_be_had_is_one_sentence(server, tmp_path, files, change, sentence):
    if files is not None:
        server.push("model", "acme/it", files)
    for name, value in change.items():
        setattr(server, name, value)
    token = {"HF_TOKEN": change["token"]} if "token" in change else {}
    said = call(server, tmp_path, "model_directory", "acme/it", change.get("revision", ""), **token)
    assert isinstance(said, str) and sentence in said and "\n" not in said
    if change.keys() & {"private", "gated"}:
        folder, _ = call(server, tmp_path, "model_directory", "acme/it", HF_TOKEN="good")
        assert (Path(folder) / "model.safetensors").read_bytes() == TINY["model.safetensors"]


def test_a_file_of_the_cache_that_was_cut_is_named(server, tmp_path):
    server.push("model", "acme/tiny", TINY)
    folder, _ = call(server, tmp_path, "model_directory", "acme/tiny")
    with open(Path(folder) / "tokenizer.json", "r+b") as file:
        file.truncate(10)
    said = call(server, tmp_path, "model_directory", "acme/tiny")
    assert said.endswith("tokenizer.json has 10 bytes, and on the hub 9,896: delete it; it is fetched again")


def test_a_data_set_is_its_splits_shards_at_one_commit(tmp_path):
    files = {f"main/train-0000{n}-of-00002.parquet": parquet(n) for n in range(2)}
    readme = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: learn\n    path: main/train-*\n---\n# It\n"
    with HubServer() as server:
        commit = server.push("dataset", "acme/sums", files | {"main/test-00000-of-00001.parquet": parquet(2)})
        shards, found = call(server, tmp_path, "dataset_files", "acme/sums", "", "train")
        assert found == commit and [Path(shard).read_bytes() for shard in shards] == list(files.values())
        assert len(server.asked_for("test-00000-of-00001.parquet")) == 0
        branch = "refs/convert/parquet"
        converted = server.push("dataset", "acme/sums", {"main/test/0000.parquet": parquet(3)}, ref=branch)
        shards, found = call(server, tmp_path, "dataset_files", "acme/sums", "main", "test", branch)
        assert found == converted and [Path(shard).read_bytes() for shard in shards] == [parquet(3)]
        server.push("dataset", "acme/said", files | {"README.md": readme})
        assert call(server, tmp_path, "dataset_files", "acme/said") == (
            "the subset 'main' of 'acme/said' has no split 'train'; known: learn"
        )
        learn = call(server, tmp_path, "dataset_files", "acme/said", "", "learn")
        assert [Path(shard).name for shard in learn[0]] == [name.rpartition("/")[2] for name in files]
    assert call(server, tmp_path, "dataset_files", "acme/said", "", "learn") == learn


def card(*entries) -> list:
    return [{"config_name": name, **rest} for name, rest in entries]


TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
TWO = ["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"]
FOLDERS = card(("m", {"data_dir": "main"}), ("s", {"data_dir": "socratic", "default": True}))


@pytest.mark.parametrize(
    ("paths", "configs", "asked", "chosen"),
    [
        ([TRAIN, TEST, "README.md"], None, ("", "train"), [TRAIN]),
        ([TRAIN, TEST], None, ("default", "test"), [TEST]),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], None, ("", "train"), "all"),
        (["data/train_sft-00000-of-00001.parquet", TRAIN], None, ("", "train_sft"), 1),
        (TWO, None, ("socratic", "train"), TWO[1:]),
        ([f"main/train/{n:04}.parquet" for n in range(12)] + ["main/test/0000.parquet"], None, ("main", "train"), 12),
        (["train/10.parquet", "train/9.parquet"], None, ("", "train"), ["train/9.parquet", "train/10.parquet"]),
        (["train.jsonl", "test.jsonl"], None, ("", "test"), ["test.jsonl"]),
        (["train.jsonl", "test.parquet"], None, ("", "test"), ["test.parquet"]),
        (["data/math-17k.parquet"], None, ("", "train"), "all"),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl", "more.jsonl"], None, ("", "train"), 1),
        (["a/x.jsonl", "b/y.jsonl"], card(("q", {"data_files": "a/*.jsonl"})), ("", "train"), ["a/x.jsonl"]),
        (TWO, card(("q", {"data_files": [{"split": "dev", "path": [TWO[1]]}]})), ("q", "dev"), TWO[1:]),
        (TWO, card(("q", {"data_files": {"dev": "**/train-*"}})), ("q", "dev"), "all"),
        ([TRAIN], card(("q", {"data_files": "*"})), ("", "train"), "of which none is there as parquet or JSONL"),
        (TWO, FOLDERS, ("m", "train"), TWO[:1]),
        (TWO, FOLDERS, ("", "train"), TWO[1:]),
        (TWO, None, ("", "train"), "has several subsets; set data.subset to one of 'main', 'socratic'"),
        (TWO, None, ("maine", "train"), "has no subset 'maine'; the nearest is 'main'"),
        ([TRAIN, TEST], None, ("", "tests"), "subset 'default' of 'o/n' has no split 'tests'; the nearest is 'test'"),
        (["n.py", "README.md"], None, ("", "train"), "has a loading script, n.py, which is not run, and no parquet or"),
        (["rows.csv"], None, ("", "train"), "has no parquet and no JSONL; it has 'rows.csv'"),
        ([TRAIN], card(("q", {"data_files": "x/*.csv"})), ("", "train"), "of which none is there as parquet or JSONL"),
    ],
)  # fmt: skip
def test_a_split_is_found_in_the_layouts_that_data_sets_have(paths, configs, asked, chosen):
    if isinstance(chosen, str) and chosen != "all":
        with pytest.raises(UserError) as refused:
            hub.select(paths, configs, *asked, "o/n")
        assert chosen in str(refused.value)
    else:
        expected = list(paths) if chosen == "all" else paths[:chosen] if isinstance(chosen, int) else chosen
        assert hub.select(paths, configs, *asked, "o/n") == expected


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("openai/gsm8k", True), ("Qwen/Qwen3-0.6B-Base", True), ("gsm8k", False), ("a/b/c", False), ("./b", False)]
    + [("~/b", False), ("a/..", False), ("a/b--c", False), ("/a/b", False), ("a/b.git", False)]
    + [("a/" + "b" * 96, False)],
)
def test_a_name_is_an_organisation_and_a_repository(text, is_one):
    assert hub.is_name(text) == is_one
