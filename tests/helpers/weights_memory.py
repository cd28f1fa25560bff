"""Models that are loaded over the devices of one or two processes, and exported again: memory, time, and every value.

    python -m tests.helpers.weights_memory write FOLDER --parameters 2e9
    python -m tests.helpers.weights_memory measure FOLDER --out FOLDER2

`write` makes a model directory of random bfloat16 weights, tensor by tensor. `measure` runs the same process with and
without the model, with one process of eight fake devices and two of four, and prints how much each one's peak of memory
rose by the model, beside what its devices hold; it leaves FOLDER2/found.json. tests/models/test_weights.py does so on a
small model, and starts `compare`, which holds every value against what is read whole. The processes themselves are
`python -m tests.helpers.weights_memory member ...`.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.places import ROOT

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def model_of(parameters: float) -> Any:
    """A Llama of about so many parameters, a seventh of them in embedding and head."""
    from dppo_jax.models.config import config_from_hf

    width = 128
    while _count(_fields(width + 128)) < parameters:
        width += 128
    return config_from_hf(_fields(width), "here")


def _fields(width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": 16, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "head_dim": 64, "vocab_size": 16 * width, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip


def _count(fields: dict[str, Any]) -> int:
    width = fields["hidden_size"]
    return fields["num_hidden_layers"] * width * (4 * width + 3 * fields["intermediate_size"]) + (
        2 * fields["vocab_size"] * width
    )


def write(folder: Path, parameters: float) -> None:
    """A model directory of random bfloat16 weights."""
    import ml_dtypes

    from dppo_jax.models.config import config_to_hf
    from dppo_jax.models.hf import layout_of
    from dppo_jax.models.tensor_files import Entry, StreamWriter

    config = model_of(parameters)
    layout, numbers = layout_of(config), np.dtype(ml_dtypes.bfloat16)
    entries = [Entry(leaf.name(index), leaf.tensor_shape) for leaf in layout for index in leaf.indices()]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with StreamWriter(folder / "model.safetensors", entries, numbers) as file:
        for entry in entries:
            bits = rng.integers(0x3800, 0x3C00, int(np.prod(entry.shape)), np.uint16)  # from 3e-5 to 8e-3
            file.write((bits | rng.integers(0, 2, bits.shape, np.uint16) << 15).view(numbers))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))


# --- one process ---


def peak_bytes() -> int:
    """The largest that the resident memory of this process has been."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def member(arguments: argparse.Namespace) -> None:
    """Prints a JSON object: peaks of memory and seconds; or, of `compare`, what was the same."""
    import jax

    if arguments.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{arguments.port}", num_processes=arguments.processes, process_id=arguments.process
        )
    from dppo_jax.models import read_weights, write_weights

    if arguments.block:
        read_weights.BLOCK = write_weights.BLOCK = arguments.block
    print("found", json.dumps(compare(arguments) if arguments.compare else load_and_export(arguments)))


def load_and_export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a little model first: all that is imported and kept, whatever the model."""
    import jax
    from jax.experimental import multihost_utils

    from dppo_jax.devices.sharding import make_mesh, named_shardings
    from dppo_jax.models.decoder import param_axes
    from dppo_jax.models.hf import load_config, place_params, save_hf

    found: dict[str, Any] = {}
    mesh, little = make_mesh(MESH), arguments.folder.parent / "little"
    for folder in (little, *([] if arguments.without else [arguments.folder])):
        config = load_config(folder)
        begun = time.monotonic()
        params = jax.block_until_ready(place_params(folder, named_shardings(mesh, param_axes(config)))[1])
        found["load_s"], found["load_peak"] = time.monotonic() - begun, peak_bytes()
        shards = [shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards]
        found["held"], found["whole"] = sum(shards), sum(x.nbytes for x in jax.tree.leaves(params))
        begun = time.monotonic()
        save_hf(arguments.out / folder.name, config, params, None, "bfloat16")
        multihost_utils.sync_global_devices("saved")
        found["export_s"], found["export_peak"] = time.monotonic() - begun, peak_bytes()
    if not arguments.without and arguments.process == 0:
        found["same"] = digests(arguments.out / arguments.folder.name) == digests(arguments.folder)
    return found


# Of the model in FOLDER/<name>: the sizes of meshes (data, fsdp, tensor, expert), and the order of the devices.
IN_ORDER, IN_TURN = (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)
COMPARED = [
    ("dense", (1, 8, 1, 1), IN_ORDER), ("dense", (8, 1, 1, 1), IN_ORDER), ("dense", (2, 2, 2, 1), IN_TURN),
    ("mixture", (1, 2, 1, 4), IN_ORDER), ("mixture", (2, 1, 2, 2), IN_TURN),
]  # fmt: skip


def compare(arguments: argparse.Namespace) -> dict[str, list[bool]]:
    """Of every mesh: whether every piece is that of the model that is read whole, and whether the export is too."""
    import jax
    from jax.experimental import multihost_utils

    from dppo_jax.devices.sharding import make_mesh, named_shardings
    from dppo_jax.models.decoder import param_axes
    from dppo_jax.models.hf import load_params, place_params, save_hf

    report = {}
    for number, (name, sizes, order) in enumerate(COMPARED):
        devices = [jax.devices()[at] for at in order]
        mesh = make_mesh(dict(zip(("data", "fsdp", "tensor", "expert"), sizes, strict=True)), devices)
        config, whole = load_params(arguments.folder / name)
        params = place_params(arguments.folder / name, named_shardings(mesh, param_axes(config)))[1]
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True)
        pieces = [(shard, x) for leaf, x in leaves for shard in leaf.addressable_shards]
        same = [all(np.array_equal(shard.data, x[shard.index]) for shard, x in pieces)]
        save_hf(arguments.out / str(number), config, params, None, "bfloat16")
        multihost_utils.sync_global_devices("saved")
        again = load_params(arguments.out / str(number))[1]
        same.append(all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(whole))))
        report[f"{name} {sizes}"] = same
    return report


def digests(folder: Path) -> dict[str, str]:
    """Of every tensor of a model directory."""
    from contextlib import ExitStack

    from dppo_jax.models.read_weights import open_directory

    with ExitStack() as stack:
        tensors = open_directory(folder, stack)
        return {
            name: hashlib.sha256(tensor.read().reshape(-1).view(np.uint8)).hexdigest()
            for name, tensor in sorted(tensors.items())
        }


# --- all of them ---


def run_members(folder: Path, out: Path, processes: int, *more: str) -> list[dict[str, Any]]:
    """What each of so many processes, of eight devices together, found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={8 // processes} {os.environ.get('XLA_FLAGS', '')}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.helpers.weights_memory", "member", str(folder), "--out", str(out), *more]
    command += ["--port", str(port), "--processes", str(processes)]
    members = [
        subprocess.Popen([*command, "--process", str(n)], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    try:
        said = [member.communicate(timeout=1200)[0] for member in members]
    finally:
        for member in members:
            member.kill()
    assert not any(member.returncode for member in members), said
    lines = [line for text in said for line in text.splitlines() if line.startswith("found ")]
    return [json.loads(line.removeprefix("found ")) for line in lines]


def measure(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    """Of one and of two processes: for each what its devices hold, and its peaks beyond a process without the model."""
    write(folder.parent / "little", 2e5)
    report = {}
    for processes in (1, 2):
        bare = run_members(folder, out, processes, "--without", *more)
        found = run_members(folder, out, processes, *more)
        for with_model, without in zip(found, bare, strict=True):
            for name in ("load_peak", "export_peak"):
                with_model[name] -= without[name]
        shutil.rmtree(out / folder.name)
        report[str(processes)] = found
    out.mkdir(exist_ok=True)
    (out / "found.json").write_text(json.dumps(report, indent=1))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["write", "measure", "member"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=2e9)
    parser.add_argument("--out", type=Path)
    for name in ("--without", "--compare"):
        parser.add_argument(name, action="store_true")
    for name, default in (("--port", 0), ("--processes", 1), ("--process", 0), ("--block", 0)):
        parser.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    if arguments.what == "write":
        write(arguments.folder, arguments.parameters)
    elif arguments.what == "member":
        member(arguments)
    else:
        print(json.dumps(measure(arguments.folder, arguments.out), indent=1))


if __name__ == "__main__":
    main()
