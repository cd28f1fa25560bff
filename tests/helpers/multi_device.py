"""One rollout and two updates on several meshes of eight devices, against one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m tests.helpers.multi_device FOLDER

Run in its own process, since the number of devices is fixed when jax starts. tests/devices/test_sharding.py starts it
and reads FOLDER/found.json, {mesh: what was found}, and FOLDER/<mesh>/checkpoints.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import packing
from dppo_jax.devices.sharding import batch_sharding, make_mesh
from dppo_jax.metrics import summary
from dppo_jax.models import ModelConfig, moe
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.sampling import step_key
from dppo_jax.storage.checkpoint import Checkpoints
from dppo_jax.train_step import assemble, init_state, jit_update, state_shardings
from dppo_jax.types import PromptBatch
from experiments.run import checks
from experiments.run.setup import ROLLOUT, Setup, Text
from tests.helpers.fixtures import EOS, MOE, PAD, TINY, random_params, small_config

ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)]  # data, fsdp, tensor
MIXTURE_MESHES = [(1, 2, 1, 4), (2, 1, 2, 2), (1, 1, 4, 2)]  # and expert


class Case(NamedTuple):
    """A model, and rollout keys of its own."""

    model: ModelConfig
    params: dict
    numbers: dict


def dense() -> Case:
    return Case(TINY, random_params(), {})


def mixture() -> Case:
    """Its experts are replayed; in training the pairs of token and expert go through in several pieces."""
    moe.FEW, moe.TILE = 16, 8  # a decode step has few
    return Case(MOE, random_params(model=MOE), dict(rollout__router_replay=True))


def config_of(sizes, numbers):
    """Top-K, so that tracked ids meet a sharded vocabulary; pieces of one row a device; 16 slots for 32 rows.

    One device alone decodes all rows side by side, so that the slots are compared too.
    """
    numbers |= dict(loss__name="dppo_topk_tv", rollout__tracked=3, train__micro_rows=1, optimizer__eps=1e-4)
    numbers |= dict(rollout__max_new_tokens=24, rollout__slots=0 if sizes == ALONE else 16)
    places = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor", "mesh__expert"), sizes, strict=False))
    return small_config(Path("unused"), **numbers, **places)


def prompt_batch(config) -> PromptBatch:
    numbers = np.random.default_rng(1)
    n, length = config.rollout.prompts, config.data.max_prompt_len
    return PromptBatch(
        tokens=numbers.integers(2, TINY.vocab_size, size=(n, length)).astype(np.int32),
        mask=np.arange(length) >= numbers.integers(0, length, size=(n, 1)),
        group=np.arange(n, dtype=np.int32),
    )


def parts(array) -> int:
    """How many different pieces of an array the devices hold."""
    return len({str(index) for index in array.sharding.devices_indices_map(array.shape).values()})


def run(sizes, devices, folder, case: Case):
    """What the training loop does in a step, on a mesh of these sizes, and its checkpoint in `folder`."""
    model, config = case.model, config_of(sizes, case.numbers)
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        checks.check(config)
        checks.check_mesh(config, mesh, model)
        prompts = prompt_batch(config)
        prompt_lengths = np.repeat(prompts.mask.sum(axis=1), config.rollout.group_size)
        setup = Setup(config, model, mesh, Text(None, (EOS,), PAD), prompt_lengths.mean())
        shardings = state_shardings(param_axes(model), setup.optimizer, abstract_params(model), mesh)
        state = init_state(case.params, setup.optimizer, shardings)
        start = jax.tree.map(np.asarray, state.params)
        policy = setup.rollout()
        generate = setup.on_mesh(policy)
        update = jit_update(setup.update, shardings, mesh)
        key = step_key(0, 0, ROLLOUT)
        rollout = generate(state.params, prompts, key)
        scanned = setup.on_mesh(dataclasses.replace(policy, unrolled=False))(state.params, prompts, key)
        batch = jax.jit(assemble, out_shardings=batch_sharding(mesh))(prompts, rollout)
        rewards = np.random.default_rng(2).integers(0, 2, size=batch.tokens.shape[0]).astype(np.float32)
        advantages = jax.jit(setup.advantages, out_shardings=batch_sharding(mesh))
        batch = batch.replace(advantages=advantages(jnp.asarray(rewards), rollout.group))
        lengths = np.asarray(rollout.response_mask).sum(axis=1)
        plans = [packing.plan(index, prompt_lengths, lengths, setup.pack_shape) for index in setup.minibatches(0)]
        summaries = []
        for plan in plans:
            state, metrics = update(state, batch, plan)
            summaries.append(summary(jax.device_get(metrics)))
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(1, state)
        pieces = {}
        for what, tree in (
            ("params", state.params),
            ("mu", state.opt_state[1][0].mu),
            ("nu", state.opt_state[1][0].nu),
        ):
            flat = {name: leaf for name, leaf in tree.items() if name != "layers"} | tree["layers"]
            pieces[what] = {name: parts(leaf) for name, leaf in flat.items()}
        return {
            "rollout": jax.tree.map(np.asarray, rollout),
            "scanned": jax.tree.map(np.asarray, scanned),
            "summaries": summaries,
            "params": jax.tree.map(np.asarray, state.params),
            "start": start,
            "pieces": pieces,
            "row_pieces": [parts(rollout.tokens), parts(batch.behavior_logp), parts(batch.advantages)],
            "train_pieces": [[int(plan.num_microbatches), len(plan.sample_of)] for plan in plans],
            "compiled": [generate._cache_size(), update._cache_size()],
        }


def largest_difference(tree, other) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(x - y))), tree, other)))


def compare(found, single) -> dict:
    report = {name: found[name] for name in ("pieces", "row_pieces", "train_pieces", "compiled")}
    for name in ("tokens", "response_mask", "topk_ids"):
        report[f"same_{name}"] = bool(np.array_equal(getattr(found["rollout"], name), getattr(single["rollout"], name)))
    for name in ("behavior_logp", "topk_logp"):
        report[name] = largest_difference(getattr(found["rollout"], name), getattr(single["rollout"], name))
    report["same_scanned"] = bool(np.array_equal(found["scanned"].tokens, single["rollout"].tokens))
    report["summaries"] = found["summaries"]
    report["params"] = largest_difference(found["params"], single["params"])
    return report


def main(folder: Path) -> None:
    devices = jax.devices()
    assert len(devices) == 8, devices
    report = {}
    for case, meshes, prefix in ((dense(), MESHES, ""), (mixture(), MIXTURE_MESHES, "moe-")):
        alone = f"{prefix}1x1x1"
        single = run(ALONE, devices[:1], folder / alone, case)
        report[alone] = compare(single, single)
        report[alone]["moved"] = largest_difference(single["params"], single["start"])
        report[alone]["lengths"] = single["rollout"].response_mask.sum(axis=1).tolist()
        for sizes in meshes:
            name = prefix + "x".join(map(str, sizes))
            report[name] = compare(run(sizes, devices, folder / name, case), single)
    (folder / "found.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
