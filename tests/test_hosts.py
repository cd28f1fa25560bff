"""Two processes of two devices each, as two hosts, against one device: rollouts as each host reads them, and a run."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dppo_jax.models import load_params
from dppo_jax.models.decoder import param_axes
from dppo_jax.run_log import read_scalars
from dppo_jax.sampling import step_key
from dppo_jax.sharding import make_mesh, named, to_host
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments import build, checks
from tests.fixtures import EOS, HURRIED_FLAGS, PAD, TINY, hurried, random_params, run, run_config, small_config, tiny

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
        checks.check(config)
        checks.check_mesh(config, mesh, TINY)
        text = build.Text(tokenizer=None, eos_ids=(EOS,), pad_id=PAD)
        generate = build.on_mesh(build.rollout(config, TINY, text, mesh), mesh)
        params, prompts = place(random_params(), mesh), prompt_batch(config)
        steps = [generate(params, prompts, step_key(0, step, build.ROLLOUT)) for step in range(2)]
        return [to_host(out) for out in steps], generate._cache_size()


def loop_config(folder: Path, sizes):
    """Parameters cut over both hosts, evaluation, the trained policy exported, and the next batch drawn early."""
    places = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    numbers = dict(rollout__slots=SLOTS, train__staleness=1, optimizer__eps=1e-4, compile_cache="")
    return run_config(folder, steps=2, **numbers, **places)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of two processes of tests/two_hosts.py, and how each ended: its last line, or nothing if all is well.

    Their compilations are hurried: results stay, speed does not.
    """
    folder, port = tmp_path_factory.mktemp("hosts"), free_port()
    shutil.copytree(tiny(tmp_path_factory), folder, dirs_exist_ok=True)
    flags = f"--xla_force_host_platform_device_count=2 {HURRIED_FLAGS}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    logs = [folder / f"{number}.log" for number in range(2)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.two_hosts", str(folder), str(port), str(number)]
            output = stack.enter_context(open(log, "w"))
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        for process in processes:
            process.wait(TIME_LIMIT_S)
    return folder, [log.read_text() if process.returncode else "" for process, log in zip(processes, logs, strict=True)]


@pytest.fixture(scope="module")
def folder(processes) -> Path:
    """Where the rollouts are."""
    folder, errors = processes
    assert all((folder / f"{mesh}-{process}.npz").exists() for mesh in MESHES for process in range(2)), errors
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


def test_what_every_host_has_already_is_left_as_it_is(folder):
    for process in range(2):
        found = np.load(folder / f"everyone_s-{process}.npz")
        lists = {name: x.tolist() for name, x in found.items()}
        assert lists == {"numpy": [0, 1, 2], "scalar": 2, "local": [0, 1, 2, 3]}


def test_a_whole_run_on_two_hosts_is_that_of_one_device(processes, tmp_path_factory):
    """Scores and what is written come from one place, parameters from both: the same metrics and the same policy."""
    folder, errors = processes
    assert errors == ["", ""], "\n".join(errors)
    with hurried(tmp_path_factory):
        alone = run(loop_config(tiny(tmp_path_factory), (1, 1, 1)), tmp_path_factory.mktemp("alone") / "run").folder
    found, want = read_scalars(folder / "run"), read_scalars(alone)
    assert found.keys() == want.keys() and "eval/sums/avg" in found
    for tag, (steps, values) in want.items():
        np.testing.assert_array_equal(found[tag][0], steps)
        if not tag.startswith(("time/", "throughput/")):
            np.testing.assert_allclose(found[tag][1], values, rtol=1e-4, atol=1e-6, err_msg=tag)
    policies = (load_params(at / "policy")[1] for at in (folder / "run", alone))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), *policies)
