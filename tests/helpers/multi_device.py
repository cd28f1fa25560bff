"""Rollouts and two updates on several meshes of eight devices, against one device.

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
from dppo_jax.devices.sharding import batch_sharding, make_mesh, named_shardings
from dppo_jax.metrics import summary
from dppo_jax.models import ModelConfig, moe
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.rollout import Finished, Work
from dppo_jax.sampling import step_key
from dppo_jax.storage.checkpoint import Checkpoints
from dppo_jax.train_step import assemble, init_state, jit_update, state_shardings
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.run import checks
from experiments.run.rollouts import rollout_in_flight, training_rollout
from experiments.run.setup import ROLLOUT, Setup, Text
from tests.helpers.fixtures import EOS, MOE, PAD, TINY, random_params, small_config

ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)]  # data, fsdp, tensor
MIXTURE_MESHES = [(1, 2, 1, 4), (2, 1, 2, 2), (1, 1, 4, 2)]  # and expert
# A cache of pages on some of them, and rows in flight: how the layers are, and pages of a shard.
PAGED = {(8, 1, 1): (True, None), (2, 2, 2): (False, 4), (1, 2, 4): (False, 4), (2, 1, 2, 2): (False, 4)}
IN_FLIGHT = {(2, 2, 2): True, (1, 8, 1): False}  # whether on pages


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
        policy = training_rollout(setup)
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
            "train_pieces": [[int(plan.num_microbatches), len(plan.tokens_per_row)] for plan in plans],
            "compiled": [generate._cache_size(), update._cache_size()],
        }


def on_mesh(sizes, devices, case: Case, **numbers) -> Setup:
    """Of a rollout, on a mesh of these sizes; its rows never end before their limits."""
    config = config_of(sizes, case.numbers | numbers)
    return Setup(config, case.model, make_mesh(config.mesh, devices), Text(None, (), PAD))


def placed(setup: Setup, params):
    return jax.device_put(params, named_shardings(setup.mesh, param_axes(setup.model)))


def paged(sizes, devices, case: Case, unrolled: bool = False, pages: int | None = None) -> tuple[RolloutBatch, Work]:
    """Rows of up to three pages that make room for one another; on one device, in blocks."""
    setup, numbers, length = on_mesh(sizes, devices, case), np.random.default_rng(4), 150
    prompts = PromptBatch(
        tokens=numbers.integers(2, TINY.vocab_size, size=(8, length)).astype(np.int32),
        mask=np.arange(length) >= length - np.array([125, 120, 150, 127, 1, 128, 126, 124])[:, None],
        group=np.arange(8, dtype=np.int32),
        limit=numbers.choice([3, 100, 138, 140], size=(8, 2)).astype(np.int32),
    )
    with jax.set_mesh(setup.mesh):
        policy = dataclasses.replace(
            training_rollout(setup), group_size=2, max_new_tokens=140, slots=None if sizes == ALONE else 8,
            unrolled=unrolled,
            paged=sizes != ALONE, pages=pages,
        )  # fmt: skip
        generate = setup.on_mesh_measured(policy.measured)
        found = generate(placed(setup, case.params), prompts, step_key(0, 0, ROLLOUT))
        return jax.tree.map(np.asarray, found)


def in_flight(sizes, devices, case: Case, pages: bool) -> list[Finished]:
    """Three steps of rows in flight under the same parameters."""
    cache = "pages" if pages else "blocks"
    setup = on_mesh(sizes, devices, case, rollout__in_flight=1, rollout__max_age=3, rollout__cache=cache)
    found, key = [], jax.random.key(5)
    with jax.set_mesh(setup.mesh):
        draws = rollout_in_flight(setup, training_rollout(setup))
        params = placed(setup, case.params)
        empty = jax.jit(lambda: draws.empty(setup.config.data.max_prompt_len), out_shardings=setup.by_row)
        join, draw = jax.jit(draws.join, out_shardings=setup.by_row), jax.jit(draws)
        flight = join(empty(), flight_prompts(setup, 0), np.int32(0))
        for step in range(3):
            flight = join(flight, flight_prompts(setup, step + 1), np.int32(step + 1))
            flight, finished = draw(params, flight, key, np.int32(step))
            found.append(jax.tree.map(np.asarray, finished))
    return found


def flight_prompts(setup: Setup, batch: int) -> PromptBatch:
    """The prompts of a step, with limits so that many rows stay in flight."""
    numbers, c = np.random.default_rng(batch), setup.config.rollout
    limit = numbers.choice([1, 3, 12, 24], size=(c.prompts, c.group_size)).astype(np.int32)
    return dataclasses.replace(prompt_batch(setup.config), limit=limit)


def without_flight(devices, case: Case) -> list[RolloutBatch]:
    """The same batches of prompts, each drawn to its end on one device."""
    setup, key = on_mesh(ALONE, devices, case), jax.random.key(5)
    with jax.set_mesh(setup.mesh):
        generate, params = setup.on_mesh(training_rollout(setup)), placed(setup, case.params)
        batches = [generate(params, flight_prompts(setup, batch), jax.random.fold_in(key, batch)) for batch in range(4)]
        return jax.tree.map(np.asarray, batches)


def compare_flight(found: list[Finished], whole: list[RolloutBatch]) -> dict:
    """Every group against the one of its batch and number there."""
    report: dict = {"same_tokens": True, "behavior_logp": 0.0, "origins": [], "rows_left": []}
    for finished in found:
        group_size = len(finished.rollout.tokens) // len(finished.origin)
        for at, (batch, number) in enumerate(finished.origin.tolist()):
            got, want = (slice(x * group_size, (x + 1) * group_size) for x in (at, number))
            for name in ("tokens", "response_mask", "topk_ids"):
                same = np.array_equal(getattr(finished.rollout, name)[got], getattr(whole[batch], name)[want])
                report["same_tokens"] &= same
            gap = largest_difference(finished.rollout.behavior_logp[got], whole[batch].behavior_logp[want])
            report["behavior_logp"] = max(report["behavior_logp"], gap)
            report["origins"].append([batch, number])
        report["rows_left"].append(int(finished.rows_left))
    return report


def compare_paged(found: tuple[RolloutBatch, Work], single: tuple[RolloutBatch, Work]) -> dict:
    (batch, work), (want, _) = found, single
    report: dict = {name: float(x) for name, x in vars(work).items()}
    for name in ("tokens", "response_mask", "topk_ids", "experts"):
        report[f"same_{name}"] = bool(np.array_equal(getattr(batch, name), getattr(want, name)))
    for name in ("behavior_logp", "topk_logp"):
        report[name] = largest_difference(getattr(batch, name), getattr(want, name))
    return report


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
        single_paged = paged(ALONE, devices[:1], case)
        for sizes in [sizes for sizes in meshes if sizes in PAGED]:
            report[f"paged-{'x'.join(map(str, sizes))}"] = compare_paged(
                paged(sizes, devices, case, *PAGED[sizes]), single_paged
            )
    whole = without_flight(devices[:1], dense())
    for sizes, pages in IN_FLIGHT.items():
        name = f"flight-{'x'.join(map(str, sizes))}"
        report[name] = compare_flight(in_flight(sizes, devices, dense(), pages), whole)
    (folder / "found.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
