"""Sums over the bits of a state: by their definition, and against a checkpoint whose files are whole."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, restore_params
from dppo_jax.storage.checkpoint import manifest as manifest_file
from dppo_jax.storage.checkpoint.sums import changed_leaf, compile_sums, sums
from experiments.chaos.inputs.states import abstract, state
from tests.helpers.checkpoints import equal, write

DRAW = np.random.default_rng(0)
ARRAYS = {
    "float32": DRAW.normal(size=(3, 5, 2)).astype(np.float32),
    "bfloat16": DRAW.normal(size=7).astype(ml_dtypes.bfloat16),
    "int8": DRAW.integers(-128, 128, size=(4, 4)).astype(np.int8),
    "int32": DRAW.integers(-9, 9, size=(2, 3)).astype(np.int32),
    "bool": DRAW.integers(0, 2, size=9).astype(bool),
    "float64": DRAW.normal(size=(2, 3)),
    "scalar": np.asarray(-0.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "long": DRAW.normal(size=70_000).astype(np.float32),  # more than NumPy takes at once
}


def by_definition(x: np.ndarray) -> str:
    """In Python's integers, entry by entry."""
    total, size, most = 0, x.dtype.itemsize, 2**32
    data = np.ascontiguousarray(x).tobytes()
    signed = np.issubdtype(x.dtype, np.signedinteger)
    for place in range(x.size):
        entry = int.from_bytes(data[place * size : (place + 1) * size], "little", signed=signed)
        bits = entry % (most * most if size == 8 else most)
        if size == 8:
            bits = bits % most ^ (bits // most * 0x9E3779B9 % most)
        mixed = (bits + place * 0x9E3779B9) % most
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % most
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % most
        total += mixed ^ mixed >> 16
    return f"{x.dtype.name}:{total % most:08x}"


def test_on_the_host_and_on_a_device_they_are_those_of_the_definition():
    wanted = {f"params/{name}": by_definition(x) for name, x in ARRAYS.items()}
    assert sums({"params": ARRAYS}) == wanted
    with jax.enable_x64(True):
        assert sums({"params": {name: jnp.asarray(x) for name, x in ARRAYS.items()}}) == wanted
    mixed = {"past": [ARRAYS, {name: jnp.asarray(x) for name, x in ARRAYS.items() if x.dtype != np.float64}]}
    found = sums(mixed)
    assert found["past/0/int8"] == found["past/1/int8"] == wanted["params/int8"]


def test_a_changed_bit_and_two_changed_places_are_seen():
    whole = ARRAYS["float32"]
    wanted = sums({"x": whole})
    flat = whole.reshape(-1).view(np.uint32)
    for bit in range(32):
        changed = flat.copy()
        changed[bit % len(flat)] ^= np.uint32(1 << bit)
        assert changed_leaf(wanted, {"x": jnp.asarray(changed.view(np.float32).reshape(whole.shape))}) == "x"
    signs = -whole  # all top bits, which a plain sum would cancel
    for other in (signs, whole[::-1].copy(), np.swapaxes(whole, 0, 2).reshape(whole.shape)):
        assert changed_leaf(wanted, {"x": other}) == "x"
    assert changed_leaf(wanted, {"x": whole, "new": whole}) is None
    assert changed_leaf(wanted, {"x": whole.astype(ml_dtypes.bfloat16)}) is None
    assert changed_leaf({}, {"x": -whole}) is None


def test_what_was_compiled_before_is_not_compiled_again():
    compiled: list[str] = []

    def listen(event: str, _: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    held = state(3)
    shapes = abstract()
    later = {**held, "past": 3 * held["past"]}
    compile_sums(shapes)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sums(later)
        sums({name: tree for name, tree in later.items() if name != "ahead"})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def resealed(run, step: int, **changes) -> None:
    """With another manifest, as if this had been written: every byte is as it says."""
    folder = run / "checkpoints" / str(step)
    body = manifest_file._read(folder) | changes
    body = {name: value for name, value in body.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": manifest_file._of_body(body)}))


def test_a_state_that_is_not_the_one_that_was_saved_is_set_aside_by_its_leaf(tmp_path):
    """The bytes are whole, and yet not those of the devices."""
    run = write(tmp_path / "run", (2, 4, 6))
    other = state(6)
    other["params"]["norm"] = other["params"]["norm"].at[3].multiply(-1)
    resealed(run, 6, sums=sums(other))
    sentence = "checkpoints/6/default: what is restored of params/norm is not what was saved"
    with pytest.raises(UserError, match=sentence):
        restore_params(run / "checkpoints" / "6", abstract()["params"])
    equal(restore_params(run, abstract()["params"]), state(4)["params"])
    with Checkpoints(run, keep=3) as checkpoints:
        step, found, notes = checkpoints.resume(lambda step: abstract())
    assert step == 4 and notes == [
        f"checkpoint 6 is damaged ({sentence}) and now lies in damaged_checkpoints/6; going on from checkpoint 4"
    ]
    equal(found, state(4))


def test_a_step_of_an_earlier_version_has_none(tmp_path):
    run = write(tmp_path / "run", (2,))
    resealed(run, 2, sums=None)
    with Checkpoints(run, keep=3) as checkpoints:
        step, found, notes = checkpoints.resume(lambda step: abstract())
    assert (step, notes) == (2, [])
    equal(found, state(2))
