"""What a TPU chip can do, by the maker's data sheets: compilers know how a program runs, not how fast it could."""

from typing import NamedTuple

from dppo_jax.errors import UserError, lookup

GIB = 2**30


class Chip(NamedTuple):
    """One chip; of tpu7x, one of its two dies, which JAX calls a device."""

    flops: float  # bfloat16, a second
    bandwidth: float  # bytes a second of its memory
    links: float  # bytes a second to and from its neighbours, all links together
    clock: float  # cycles a second
    memory: int  # bytes that a program may use, as the compiler says


CHIPS = {
    "v4": Chip(275e12, 1228e9, 300e9, 1.05e9, int(30.75 * GIB)),
    "v5e": Chip(197e12, 819e9, 200e9, 1.5e9, int(15.75 * GIB)),
    "v5p": Chip(459e12, 2765e9, 600e9, 1.75e9, int(95.74 * GIB)),
    "v6e": Chip(918e12, 1640e9, 400e9, 1.75e9, int(31.25 * GIB)),
    "tpu7x": Chip(1153e12, 3690e9, 600e9, 1.9e9, int(94.7 * GIB)),
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}

# The same of GPUs, dense, by what JAX calls them; with the name's beginning alone.
GPU_FLOPS = {"NVIDIA A100": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def of_topology(topology: str) -> Chip:
    """The chip of "v5p:4x4x4". UserError for one that is not in the table."""
    if ":" not in topology:
        raise UserError(f"topology {topology!r} is not CHIP:SHAPE, such as v5p:4x4x4 or v6e:8x8")
    return lookup(CHIPS, topology.split(":")[0], "chip")


def peak_of(kind: str) -> float | None:
    """Operations that a device of this `device_kind` does in a second in bfloat16, at most; None where it is not known,
    as of a CPU."""
    if kind in KINDS:
        return CHIPS[KINDS[kind]].flops
    return next((flops for name, flops in GPU_FLOPS.items() if kind.startswith(name)), None)


def memory_of(device) -> int | None:
    """Bytes of a device's memory, of a TPU also where none is at hand; None for a CPU, and where it is not known."""
    if device.platform == "cpu":
        return None
    if device.platform == "tpu":
        return CHIPS[KINDS[device.device_kind]].memory if device.device_kind in KINDS else None
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")
