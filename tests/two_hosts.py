"""Rollouts, and the whole loop, on the devices of two processes, as on two hosts.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu python -m tests.two_hosts FOLDER PORT PROCESS

Run once with PROCESS 0 and once with 1, side by side: they talk over the loopback, and their devices make a mesh of
four. tests/test_hosts.py puts what a run needs into FOLDER and starts them. It reads what each saw of every rollout,
FOLDER/<mesh>-<process>.npz, and their one run, FOLDER/run.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from dppo_jax.sharding import to_host


def main(folder: Path, port: int, process: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    from experiments.train import train
    from tests.test_hosts import MESHES, loop_config, rollouts  # it asks for the devices: there are four of them now

    assert jax.process_count() == 2 and len(jax.local_devices()) == 2
    for name, sizes in MESHES.items():
        found, compiled = rollouts(sizes, jax.devices())
        arrays = {f"{step}/{field}": x for step, out in enumerate(found) for field, x in vars(out).items()}
        np.savez(folder / f"{name}-{process}.npz", compiled=compiled, **arrays)
    everyone_s = {"numpy": np.arange(3), "scalar": np.float32(2), "local": jax.numpy.arange(4)}
    np.savez(folder / f"everyone_s-{process}.npz", **to_host(everyone_s))
    train(loop_config(folder, (1, 4, 1)), folder / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
