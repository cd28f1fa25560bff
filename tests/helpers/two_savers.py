"""Checkpoints of two processes, as of two hosts that share a file system.

    export XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu
    python -m tests.helpers.two_savers FOLDER PORT PROCESS

Run once with PROCESS 0 and once with 1, side by side. tests/storage/test_checkpoint_hosts.py starts them and reads
FOLDER/found-<process>.json.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax.devices.sharding import laid_out
from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, restore_params


def flip(step: Path) -> None:
    """A bit in the largest file, by process 0."""
    if jax.process_index() == 0:
        path = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    multihost_utils.sync_global_devices("flipped")


def main(folder: Path, port: int, process: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    assert jax.process_count() == 2 and jax.device_count() == 4
    places = {"params": {"w": NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))}}

    def state(step: int) -> dict:
        whole = np.random.default_rng(step).normal(size=(8, 300)).astype(np.float32)
        make = jax.make_array_from_callback
        return jax.tree.map(lambda place: make(whole.shape, place, lambda index: whole[index]), places)

    def same(tree: dict, step: int) -> bool:
        pairs = zip(tree["params"]["w"].addressable_shards, state(step)["params"]["w"].addressable_shards, strict=True)
        return all(np.array_equal(one.data, two.data) for one, two in pairs)

    abstract, found = laid_out(state(0), places), {}
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, state(step), {"step": step})
            checkpoints.check()
    flip(folder / "checkpoints" / "6")
    params = restore_params(folder, abstract["params"])
    found["evaluated"] = same({"params": params}, 4)
    multihost_utils.sync_global_devices("evaluated")
    with Checkpoints(folder, keep=3) as checkpoints:
        step, tree, found["notes"] = checkpoints.resume(lambda step: abstract)
        found["resumed"], found["about"] = step, checkpoints.about(step)
        found["same"] = same(tree, step)
        checkpoints.save(6, state(7))
        found["rejected"] = checkpoints.reject(6)
        checkpoints.save(6, state(8))
    for step in (2, 4, 6):
        flip(folder / "checkpoints" / str(step))
    try:
        with Checkpoints(folder, keep=3) as checkpoints:
            checkpoints.resume(lambda step: abstract)
    except UserError as error:
        found["refused"] = str(error)
    (folder / f"found-{process}.json").write_text(json.dumps(found))
    multihost_utils.sync_global_devices("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
