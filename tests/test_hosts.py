"""Two processes of two devices each, as two hosts: what each of them reads of a rollout, against one device."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dppo_jax.models.decoder import param_axes
from dppo_jax.sampling import step_key
from dppo_jax.sharding import make_mesh, named, to_host
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments import build
from tests.fixtures import EOS, HURRIED_FLAGS, PAD, TINY, random_params, small_config

ROOT = Path(__file__).parent.parent
MESHES = {"4x1x1": (4, 1, 1), "1x2x2": (1, 2, 2)}  # data, fsdp, tensor
SLOTS = 8  # of 32 rows
TIME_LIMIT_S = 300


def config_of(sizes):
    """Top-K, so that tracked ids meet a sharded vocabulary."""
    numbers = dict(loss__name="dppo_topk_tv", rollout__tracked=3, rollout__slots=SLOTS)
    places = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    return small_config(Path("unused"), **numbers, **places)


def prompt_batch(config) -> PromptBatch:
    numbers, c = np.random.default_rng(1), config.rollout
    length = config.data.max_prompt_len
    return PromptBatch(
        tokens=numbers.integers(2, TINY.vocab_size, size=(c.prompts, length)).astype(np.int32),
        mask=np.arange(length) >= numbers.integers(0, length, size=(c.prompts, 1)),
        group=np.arange(c.prompts, dtype=np.int32),
        limit=numbers.integers(1, c.max_new_tokens + 1, size=(c.prompts, c.group_size)).astype(np.int32),
    )


def place(params, mesh):
    """What every process has in NumPy, each on the devices of its own."""

    def one(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, params, named(mesh, param_axes(TINY)))


def rollouts(sizes, devices) -> tuple[list[RolloutBatch], int]:
    """Two steps in NumPy, as every host reads them; and how often they were compiled."""
    config = config_of(sizes)
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        build.check(config)
        build.check_mesh(config, mesh, TINY)
        text = build.Text(tokenizer=None, eos_ids=(EOS,), pad_id=PAD)
        generate = build.on_mesh(build.rollout(config, TINY, text, mesh), mesh)
        params, prompts = place(random_params(), mesh), prompt_batch(config)
        steps = [generate(params, prompts, step_key(0, step, build.ROLLOUT)) for step in range(2)]
        return [to_host(out) for out in steps], generate._cache_size()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the processes of tests/two_hosts.py leave. Their compilations are hurried: results stay, speed does not."""
    folder, port = tmp_path_factory.mktemp("hosts"), free_port()
    flags = f"--xla_force_host_platform_device_count=2 {HURRIED_FLAGS}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = []
    with contextlib.ExitStack() as stack:
        for number in range(2):
            command = [sys.executable, "-m", "tests.two_hosts", str(folder), str(port), str(number)]
            log = stack.enter_context(open(folder / f"{number}.log", "w"))
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        codes = [process.wait(TIME_LIMIT_S) for process in processes]
    assert codes == [0, 0], "\n".join((folder / f"{number}.log").read_text() for number in range(2))
    return folder


@pytest.fixture(scope="module")
def single() -> list[RolloutBatch]:
    """The same two steps on one device of this process."""
    return rollouts((1, 1, 1), jax.devices()[:1])[0]


def test_the_rollouts_are_worth_comparing(single):
    """Rows of many lengths, ended and truncated, more than the slots."""
    first, second = single
    assert len(first.tokens) > 2 * SLOTS and (first.tokens != second.tokens).any()
    assert len(set(first.response_mask.sum(axis=1).tolist())) > 3
    assert 0 < first.truncated.sum() < len(first.tokens)


@pytest.mark.parametrize("mesh", MESHES)
def test_both_hosts_read_the_same(folder, mesh):
    first, second = (np.load(folder / f"{mesh}-{process}.npz") for process in range(2))
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("mesh", MESHES)
def test_two_hosts_draw_what_one_device_draws(folder, single, mesh):
    """Whole arrays, of both steps, compiled once."""
    found = np.load(folder / f"{mesh}-0.npz")
    assert found["compiled"] == 1
    for step, want in enumerate(single):
        for name in ("tokens", "response_mask", "truncated", "group", "topk_ids"):
            np.testing.assert_array_equal(found[f"{step}/{name}"], getattr(want, name), name)
        for name in ("behavior_logp", "topk_logp"):
            np.testing.assert_allclose(found[f"{step}/{name}"], getattr(want, name), rtol=0, atol=1e-5)
