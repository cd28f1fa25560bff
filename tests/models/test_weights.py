"""Weights that no process holds whole: slices onto the devices, streams into files, and what a process needs for it."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dppo_jax.errors import UserError
from dppo_jax.models import load_policy, read_weights, write_weights
from dppo_jax.models.hf import load_classifier, load_params, place_classifier, place_params, save_hf, stored_dtype
from dppo_jax.models.tensor_files import Entry, StreamWriter, open_tensors
from tests.helpers import weights_memory
from tests.helpers.fixtures import MOE, TINY, random_params
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MB = 10**6


def same_trees(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), path


# --- files ---


@pytest.mark.parametrize("numbers", ["float32", "float16", "bfloat16"])
def test_a_stream_is_what_safetensors_reads(tmp_path, numbers):
    """Tensors of every rank, one of them empty, in pieces of any size, and not in the order of their names."""
    dtype = np.dtype(getattr(ml_dtypes, numbers, numbers))
    right = {
        name: np.random.default_rng(0).normal(size=shape).astype(dtype)
        for name, shape in {"z": (3, 5), "a": (7,), "none": (0, 4), "é": (2, 3, 4)}.items()
    }
    with StreamWriter(tmp_path / "file", [Entry(name, x.shape) for name, x in right.items()], dtype) as file:
        for x in right.values():
            for piece in np.array_split(x, 2):
                file.write(piece)
    with safe_open(tmp_path / "file", framework="numpy") as theirs:
        assert theirs.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "file")
    assert found.keys() == right.keys()
    for name, x in right.items():
        assert found[name].dtype == dtype and found[name].shape == x.shape and np.array_equal(found[name], x)


@pytest.mark.parametrize("piece", [16, 2**24])
def test_slices_are_read(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("dppo_jax.models.tensor_files.PIECE", piece)
    right = {"one": np.arange(7, dtype=np.float16), "two": np.arange(35, dtype=np.float32).reshape(7, 5)}
    save_file(right, tmp_path / "file")
    with ExitStack() as stack:
        tensors = open_tensors(tmp_path / "file", stack)
        for rows in (slice(None), slice(2, 5), slice(6, 7), slice(3, 3)):
            assert np.array_equal(tensors["one"].read([rows]), right["one"][rows])
            for columns in (slice(None), slice(1, 4), slice(4, 5)):
                assert np.array_equal(tensors["two"].read([rows, columns]), right["two"][rows, columns])


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    save_file({"one": np.zeros(100_000, np.float32)}, tmp_path / "file")
    with ExitStack() as stack:
        tensors = open_tensors(tmp_path / "file", stack)
        with open(tmp_path / "file", "r+b") as file:
            file.truncate(1000)
        with pytest.raises(UserError, match="file ended while tensor 'one' was read"):
            tensors["one"].read()


BAD_HEADERS = {
    "its header is no JSON object": [],
    "its header does not say where tensor 'a' is": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}},
    "its header does not say where tensor 'b' is": {"b": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
    "its header does not say where tensor 'c' is": {"c": {"dtype": "F32", "shape": [2]}},
    "tensor 'd' does not begin where the one before it ends": {
        "d": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    },
    "it has 88 bytes, and its header speaks of 84": {"e": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "its header: it has a name twice": '{"f": 1, "f": 2}',
    "its header: broken JSON": "{",
}


@pytest.mark.parametrize("sentence", BAD_HEADERS)
def test_headers_that_say_something_else_than_the_file_holds(tmp_path, sentence):
    fields = BAD_HEADERS[sentence]
    header = (fields if isinstance(fields, str) else json.dumps(fields)).ljust(72).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with ExitStack() as stack, pytest.raises(UserError) as error:
        open_tensors(tmp_path / "file", stack)
    assert str(error.value).startswith(f"{tmp_path / 'file'} is truncated or damaged: {sentence}")


# --- in ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("block", [640, 2**26])
def test_parameters_on_a_device_are_those_in_numpy(monkeypatch, family, block):
    """Built in place from blocks of a few rows, or cast as they are read."""
    monkeypatch.setattr(read_weights, "BLOCK", block)
    same_trees(place_params(MODELS / family)[1], load_params(MODELS / family)[1])


def test_the_dtype_is_rounded_to_once(monkeypatch, tmp_path):
    config, params = load_params(MODELS / "llama")
    save_hf(tmp_path, config, params, dtype="float16")
    stored = load_params(tmp_path)[1]
    for block in (640, 2**26):
        monkeypatch.setattr(read_weights, "BLOCK", block)
        found = place_params(tmp_path, None, "bfloat16")[1]
        same_trees(found, jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), stored))
    assert load_policy(str(tmp_path)).params["embed"].dtype == np.float32
    with pytest.raises(UserError, match="unknown dtype 'bfloat61'; the nearest is 'bfloat16'"):
        place_params(tmp_path, None, "bfloat61")


def test_a_tied_head_is_compared_to_its_last_row(monkeypatch, tmp_path):
    monkeypatch.setattr(read_weights, "BLOCK", 640)
    directory = Path(shutil.copytree(MODELS / "qwen2", tmp_path / "model"))
    tensors = load_file(directory / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, directory / WEIGHTS)
    place_params(directory)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, directory / WEIGHTS)
    with pytest.raises(UserError, match="tie_word_embeddings true, but 'lm_head.weight' differs"):
        place_params(directory)


def test_what_most_weights_are_stored_in(tmp_path):
    for dtype in ("float32", "bfloat16", "float16"):
        config, params = load_params(MODELS / "llama")
        save_hf(tmp_path, config, params, dtype=dtype)
        tensors = load_file(tmp_path / WEIGHTS)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
        save_file(tensors, tmp_path / WEIGHTS)
        assert stored_dtype(tmp_path) == dtype


# --- out ---


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("on_device", [False, True])
def test_weights_of_several_files(monkeypatch, tmp_path, family, on_device):
    """Each of at most so many bytes; every tensor in one of them, where the index says; and as they are in one file."""
    monkeypatch.setattr(write_weights, "LARGEST_FILE", 16_000)
    monkeypatch.setattr(write_weights, "BLOCK", 640)
    config, params = load_params(MODELS / family)
    params = jax.tree.map(jax.numpy.asarray, params) if on_device else params
    save_hf(tmp_path, config, params)
    right, index = load_file(MODELS / family / WEIGHTS), json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("model-*"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in right.values())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= 16_000 and not found.keys() & tensors.keys()
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    assert found.keys() == right.keys() == index["weight_map"].keys()
    for name, x in right.items():
        assert np.array_equal(found[name], x), name
    same_trees(load_params(tmp_path)[1], jax.device_get(params))


def test_a_model_of_other_files_is_replaced_whole(monkeypatch, tmp_path):
    """One file, several, fewer, one again: no file of the model before stays."""
    config, params = load_params(MODELS / "llama")
    other = jax.tree.map(lambda p: p + np.float32(1), params)
    for largest, weights in ((10**9, params), (16_000, other), (40_000, params), (40_000, other), (10**9, params)):
        monkeypatch.setattr(write_weights, "LARGEST_FILE", largest)
        save_hf(tmp_path, config, weights)
        names = {path.name for path in tmp_path.iterdir()}
        listed = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()) if INDEX in names else {WEIGHTS}
        assert names == listed | {"config.json"} | ({INDEX} if INDEX in names else set())
        assert (len(listed) == 1) == (largest == 10**9)
        same_trees(load_params(tmp_path)[1], weights)


# --- on eight devices, of one process and of two ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A dense model and a mixture, in bfloat16."""
    folder = tmp_path_factory.mktemp("pair")
    for name, config in (("dense", TINY), ("mixture", MOE)):
        save_hf(folder / name, config, random_params(model=config), dtype="bfloat16")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("block", [640, 2**25])
def test_every_device_has_its_piece_and_the_export_has_them_all(pair, tmp_path, processes, block):
    found = weights_memory.run_members(pair, tmp_path, processes, "--compare", "--block", str(block))
    assert len(found) == processes
    for of_process in found:
        assert len(of_process) == len(weights_memory.COMPARED)
        assert all(all(same) for same in of_process.values()), of_process


@pytest.mark.slow
def test_a_process_needs_the_memory_of_its_own_devices(tmp_path):
    """75 million parameters, 151 MB in the file and 302 MB on the devices, and blocks of 8 MB. A process that read the
    file whole, or cast it, would need 151 or 302 MB more; of two, each would hold 151 MB more that are the other's."""
    folder = tmp_path / "model"
    weights_memory.write(folder, 1e8)
    report = weights_memory.measure(folder, tmp_path / "out", "--block", str(2**23))
    for processes, found in report.items():
        assert len(found) == int(processes) and found[0]["same"]
        for of_process in found:
            assert of_process["held"] < 1.01 * of_process["whole"] / int(processes)
            for peak in (of_process["load_peak"], of_process["export_peak"]):
                assert of_process["held"] - 40 * MB < peak < of_process["held"] + 120 * MB, report


def test_a_reward_model_on_a_device(monkeypatch):
    folder = GOLDEN / "reward_models" / "llama"
    monkeypatch.setattr(read_weights, "BLOCK", 640)
    placed, read = place_classifier(folder, None, "bfloat16"), load_classifier(folder, "bfloat16")
    assert (placed.config, placed.pad_id) == (read.config, read.pad_id)
    same_trees(placed.params, read.params)
