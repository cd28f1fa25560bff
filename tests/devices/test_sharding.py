"""The table of axes, meshes that do not fit, and eight fake devices against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dppo_jax.devices.sharding import (
    MESH_AXES,
    ROLLOUT,
    TRAINING,
    batch_sharding,
    batch_shards,
    check_divisible,
    constrain,
    laid_out,
    make_mesh,
    named_shardings,
    spec,
    using,
)
from dppo_jax.errors import UserError
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.storage.checkpoint import Checkpoints, restore_params
from dppo_jax.train_step import init_state, state_shardings
from experiments.run.setup import Setup
from tests.helpers.fixtures import HURRIED_FLAGS, TINY, small_config
from tests.helpers.places import ROOT

MIXTURE_MESHES = ["moe-1x2x1x4", "moe-2x1x2x2", "moe-1x1x4x2"]
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1), "1x2x4": (1, 2, 4)}  # data, fsdp, tensor


def sizes(data=1, fsdp=1, tensor=1, expert=1):
    return dict(data=data, fsdp=fsdp, tensor=tensor, expert=expert)


def fake_mesh(*shape) -> AbstractMesh:
    return AbstractMesh((*shape, *[1] * (len(MESH_AXES) - len(shape))), MESH_AXES)


def test_every_parameter_axis_is_in_the_table():
    for axes in jax.tree.leaves(param_axes(TINY), is_leaf=lambda x: isinstance(x, tuple)):
        assert set(axes) <= set(TRAINING)


def test_spec_follows_the_table():
    assert spec("batch", "length", "vocab") == P(("data", "fsdp", "expert"), None, "tensor")
    assert spec("layers", "embed", "heads") == P(None, "fsdp", "tensor")
    assert spec("batch", None) == P(("data", "fsdp", "expert"), None)
    assert spec("layers", "expert", "expert_embed", "expert_mlp") == P(None, ("expert", "tensor", "fsdp"), None, None)
    with using(ROLLOUT):
        assert spec("layers", "embed", "heads") == P(None, None, "tensor")
        assert spec("expert", "expert_embed") == P(("expert", "tensor"), None)
    assert spec("embed") == P("fsdp")


def test_spec_refuses_to_use_a_mesh_axis_twice():
    with pytest.raises(ValueError, match="twice"):
        spec("heads", "mlp")
    with pytest.raises(ValueError, match="twice"):
        spec("batch", "embed")  # both over fsdp


def test_named_and_rows_place_by_the_table():
    mesh = fake_mesh(2, 2, 2)
    placed = named_shardings(mesh, {"a": ("vocab", "embed"), "b": {"c": ("norm",)}})
    cut = NamedSharding(mesh, P("tensor", "fsdp"))
    assert placed == {"a": cut, "b": {"c": NamedSharding(mesh, P(None))}}
    assert batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp", "expert")))
    assert batch_shards(mesh) == 4


def test_constrain_does_nothing_outside_a_mesh():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", "vocab") is x


def test_a_free_axis_takes_what_the_others_leave():
    mesh = make_mesh(sizes(fsdp=-1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}


@pytest.mark.parametrize(
    ("given", "count", "sentence"),
    [
        (sizes(data=2), 8, "does not use exactly the 8 devices there are"),
        (sizes(data=3, fsdp=-1), 8, "does not use exactly the 8 devices there are"),
        (sizes(data=4, fsdp=4), 8, "does not use exactly the 8 devices there are"),
        (sizes(data=-1, fsdp=-1), 8, "at most one of them -1"),
        (sizes(data=0), 1, "must be positive"),
        (sizes(tensor=-2), 1, "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(given, count, sentence):
    with pytest.raises(UserError, match=sentence):
        make_mesh(given, jax.devices()[:1] * count)


@pytest.mark.parametrize("shape", MESHES.values())
def test_the_tiny_model_divides_over_every_mesh_tested_here(shape):
    check_divisible(fake_mesh(*shape), {"rollout.prompts": 8}, abstract_params(TINY), param_axes(TINY))


def test_rows_that_do_not_divide_are_named_with_the_nearest_that_do():
    def refusal(count):
        with pytest.raises(UserError) as caught:
            check_divisible(fake_mesh(2, 4, 1), {"rollout.prompts": count}, {}, {})
        return str(caught.value)

    assert refusal(12) == (
        "rollout.prompts is 12 rows, which mesh.data x mesh.fsdp x mesh.expert = 8 does not divide; "
        "the nearest that fits is 16"
    )
    assert refusal(3).endswith("the nearest that fits is 8")
    assert refusal(17).endswith("the nearest that fits is 16")


def test_parameters_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"parameter embed has vocab = 16, which mesh.tensor = 3 does not divide"):
        check_divisible(fake_mesh(1, 1, 3), {}, abstract_params(TINY), param_axes(TINY))
    with pytest.raises(UserError, match="layers/down has embed = 32, which mesh.fsdp = 5"):
        tree = {"layers": {"down": abstract_params(TINY)["layers"]["down"]}}
        check_divisible(fake_mesh(1, 5, 1), {}, tree, {"layers": {"down": param_axes(TINY)["layers"]["down"]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What tests/helpers/multi_device.py leaves. Its compilations are hurried: results stay, speed does not."""
    folder = tmp_path_factory.mktemp("devices")
    flags = f"--xla_force_host_platform_device_count=8 {HURRIED_FLAGS}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "tests.helpers.multi_device", str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return json.loads((folder / "found.json").read_text())


def test_the_single_device_run_is_worth_comparing_with(found):
    single = found["1x1x1"]
    assert single["moved"] > 0.01
    assert 1 < len(set(single["lengths"]))
    first, second = single["summaries"]
    assert 0.5 < first["policy/entropy"] < 2.6  # of at most log(16) = 2.77
    assert second["trust_region/masked"] > 0 and first["grad_norm"] > 0


@pytest.mark.parametrize("mesh", [*MESHES, *MIXTURE_MESHES])
def test_eight_devices_draw_the_same_tokens(found, mesh):
    for name in ("same_tokens", "same_response_mask", "same_topk_ids", "same_scanned"):
        assert found[mesh][name], name
    assert found[mesh]["behavior_logp"] < 1e-5
    assert found[mesh]["topk_logp"] < 1e-5


@pytest.mark.parametrize("mesh", ["8x1x1", "2x2x2", "1x2x4", "2x1x2x2"])
def test_eight_devices_draw_the_same_tokens_with_a_cache_of_pages(found, mesh):
    """Of rows that share pages, and where there are few, make room; against one device and blocks."""
    report = found[f"paged-{mesh}"]
    for name in ("same_tokens", "same_response_mask", "same_topk_ids", "same_experts"):
        assert report[name], name
    assert report["behavior_logp"] < 2e-5 and report["topk_logp"] < 2e-5
    assert report["pages_read"] == report["pages_live"] > report["live"] > 0
    assert (report["put_back"] > 0) == (mesh != "8x1x1")  # where every shard has one slot


@pytest.mark.parametrize("mesh", ["2x2x2", "1x8x1"])
def test_rows_in_flight_over_eight_devices_are_those_of_one_device(found, mesh):
    """Drawn in pieces, under the same parameters, in steps that end before the longest rows do."""
    report = found[f"flight-{mesh}"]
    assert report["same_tokens"] and report["behavior_logp"] < 2e-5
    origins = [tuple(origin) for origin in report["origins"]]
    assert len(set(origins)) == len(origins) == 3 * 8
    assert all(left > 0 for left in report["rows_left"])
    assert (origins != sorted(origins)) == (mesh == "2x2x2"), "a later group was complete before an earlier one"


@pytest.mark.parametrize("mesh", [*MESHES, *MIXTURE_MESHES])
def test_eight_devices_make_the_same_updates(found, mesh):
    alone = "moe-1x1x1" if mesh in MIXTURE_MESHES else "1x1x1"
    for got, want in zip(found[mesh]["summaries"], found[alone]["summaries"], strict=True):
        assert got.keys() == want.keys()
        for tag in want:
            assert got[tag] == pytest.approx(want[tag], rel=1e-4, abs=1e-6), tag
    assert found[mesh]["params"] < 2e-5


@pytest.mark.parametrize("mesh", ["1x1x1", *MESHES])
def test_samples_share_rows_and_a_minibatch_is_several_pieces(found, mesh):
    """A row a device in each of them: as many in all as 16 samples, and some are left empty."""
    data, fsdp, _ = MESHES.get(mesh, (1, 1, 1))
    for used, pieces in found[mesh]["train_pieces"]:
        assert pieces == 16 // (data * fsdp) and used < pieces
        assert used > 1 or pieces == 2


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_moments_and_rows_are_sharded(found, mesh):
    data, fsdp, tensor = MESHES[mesh]
    for what in ("params", "mu", "nu"):
        for name, pieces in found[mesh]["pieces"][what].items():
            assert pieces == (1 if name.endswith("norm") else fsdp * tensor), (what, name)
    assert found[mesh]["row_pieces"] == [data * fsdp] * 3


def test_experts_are_cut_by_their_number(found):
    """And nothing else of them: each device runs whole ones."""
    for mesh in MIXTURE_MESHES:
        data, fsdp, tensor, expert = map(int, mesh.removeprefix("moe-").split("x"))
        for what in ("params", "mu", "nu"):
            pieces = found[mesh]["pieces"][what]
            assert {pieces[name] for name in ("gate", "up", "down")} == {expert * tensor * fsdp}
            assert pieces["q"] == fsdp * tensor
    first, second = found["moe-1x1x1"]["summaries"]
    assert 1 < first["moe/load_max"] < 8 and 0 < first["moe/routing_entropy"] < np.log(8)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_function_is_compiled_once_on_a_mesh(found, mesh):
    assert found[mesh]["compiled"] == [1, 1]


def on_one_device():
    """(mesh, where a state lives on it, its shapes)"""
    mesh = make_mesh(sizes(fsdp=-1), jax.devices()[:1])
    optimizer = Setup(small_config(Path("unused"))).optimizer
    shardings = state_shardings(param_axes(TINY), optimizer, abstract_params(TINY), mesh)
    return mesh, shardings, jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params(TINY))


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_of_eight_devices_is_restored_on_one(folder, name):
    """The whole state, as a resumed run does it."""
    mesh, shardings, fresh = on_one_device()
    states = []
    for saved in (name, "1x1x1"):
        with Checkpoints(folder / saved, keep=1) as checkpoints:
            states.append(checkpoints.restore(checkpoints.latest(), laid_out(fresh, shardings)))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(states))
    assert states[0].updates == 2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *states)


def test_parameters_alone_are_restored_on_other_devices_too(folder):
    """As the evaluation of a run that trained elsewhere needs them: placed, or in NumPy."""
    mesh, shardings, _ = on_one_device()
    plain = restore_params(folder / "2x2x2", abstract_params(TINY))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(plain))
    placed = restore_params(folder / "2x2x2", laid_out(abstract_params(TINY), shardings.params))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, placed, plain)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("", "holds no checkpoints; give a run's folder, or its checkpoints/STEP"),
        ("2x2x2/checkpoints/7", r"has no whole checkpoint 7; steps: \[1\]"),
    ],
)
def test_a_folder_without_the_checkpoint_is_refused(folder, place, sentence):
    with pytest.raises(UserError, match=sentence):
        restore_params(folder / place, abstract_params(TINY))
