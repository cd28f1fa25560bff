"""Rollouts, and rows sent back and forth, on the devices of two processes, as on two hosts.

    export XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu
    python -m tests.helpers.two_hosts FOLDER PORT PROCESS

Run once with PROCESS 0 and once with 1, side by side: they talk over the loopback, and their devices make a mesh of
eight. tests/devices/test_hosts.py starts them. It reads what each saw of every rollout, FOLDER/<name>-<process>.npz,
and what each holds of the rows of a batch, FOLDER/shares-<process>.json.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from dppo_jax.devices import hosts
from dppo_jax.devices.sharding import batch_sharding, make_mesh, to_host


def rows_of(mesh: jax.sharding.Mesh, count: int) -> dict:
    """What this process holds and owns of `count` rows, and what becomes of them."""
    mine = hosts.share(batch_sharding(mesh), count)
    numbers: np.ndarray = np.arange(count, dtype=np.int32)
    placed = hosts.to_global(numbers[mine.held], mesh, mine)
    back = hosts.owned(placed, mine)
    return {
        "held": mine.held.tolist(),
        "owned": mine.owned.tolist(),
        "placed": to_host(placed).tolist(),
        "back": back.tolist(),
        "gathered": hosts.gather(back * 2, mine).tolist(),
        "of_owned": mine.of_owned([str(row) for row in mine.held]),
        "total": hosts.total({"killed": 1, "failed": len(mine.owned)}),
        "texts": hosts.gather_texts([str(row) for row in mine.owned[:-1]], mine),
        "all_names": hosts.all_names({"both", f"of process {jax.process_index()}"}),
    }


def main(folder: Path, port: int, process: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    from tests.devices.test_hosts import DRAWN, MESHES, rollouts  # it asks for the devices: there are eight of them now

    assert jax.process_count() == 2 and len(jax.local_devices()) == 4
    shares = {}
    for name, (mesh, cache) in DRAWN.items():
        sizes, order = MESHES[mesh]
        found, compiled = rollouts(sizes, [jax.devices()[number] for number in order], cache)
        fields = {f"{step}/{field}": x for step, out in enumerate(found) for field, x in vars(out).items()}
        arrays = {field: x for field, x in fields.items() if x is not None}
        np.savez(folder / f"{name}-{process}.npz", compiled=compiled, **arrays)
    for name, (sizes, order) in MESHES.items():
        devices = [jax.devices()[number] for number in order]
        shares[name] = rows_of(make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), devices), 8)
    (folder / f"shares-{process}.json").write_text(json.dumps(shares))
    everyone_s = {"numpy": np.arange(3), "scalar": np.float32(2), "local": jax.numpy.arange(4)}
    np.savez(folder / f"everyone_s-{process}.npz", **to_host(everyone_s))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
