"""Two processes of four devices each, as two hosts: their rollouts, their rows, and whole runs by the command line."""

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dppo_jax.devices import hosts, peers
from dppo_jax.devices.sharding import batch_sharding, make_mesh, named_shardings, to_host
from dppo_jax.errors import UserError
from dppo_jax.models import load_params
from dppo_jax.models.decoder import param_axes
from dppo_jax.sampling import step_key
from dppo_jax.storage.results import read_table
from dppo_jax.storage.run_config import read_config
from dppo_jax.storage.run_log import MACHINE, event_files, read_scalars
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.eval import evaluate
from experiments.run import checks
from experiments.run.rollouts import training_rollout
from experiments.run.setup import ROLLOUT, Setup, Text
from tests.helpers.fixtures import (
    EOS,
    HURRIED_FLAGS,
    PAD,
    TINY,
    config_file,
    hurried,
    hurried_environment,
    random_params,
    run,
    run_config,
    small_config,
    tiny,
)
from tests.helpers.places import ROOT

IN_ORDER, IN_TURN = (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)
# (data, fsdp, tensor), and the devices in this order: the first four are one host's.
MESHES = {
    "rows": ((8, 1, 1), IN_ORDER),
    "turns": ((4, 2, 1), IN_TURN),  # the hosts' rows alternate
    "shared": ((2, 2, 2), IN_TURN),  # tensor is over the hosts: both hold every row
}
# What rollouts are drawn on, and with which cache.
DRAWN = {"rows": ("rows", "blocks"), "shared": ("shared", "blocks"), "pages": ("shared", "pages")}
SLOTS = 8  # of 32 rows
TIME_LIMIT_S = 300


def config_of(sizes, cache: str):
    """Top-K, so that tracked ids meet a sharded vocabulary."""
    numbers = dict(loss__name="dppo_topk_tv", rollout__tracked=3, rollout__slots=SLOTS, rollout__cache=cache)
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

    return jax.tree.map(one, params, named_shardings(mesh, param_axes(TINY)))


def rollouts(sizes, devices, cache: str = "blocks") -> tuple[list[RolloutBatch], int]:
    """Two steps in NumPy, as every host reads them; and how often they were compiled."""
    config = config_of(sizes, cache)
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        checks.check(config)
        checks.check_mesh(config, mesh, TINY)
        setup = Setup(config, TINY, mesh, Text(tokenizer=None, eos_ids=(EOS,), pad_id=PAD))
        generate = setup.on_mesh(training_rollout(setup))
        params, asked = place(random_params(), mesh), hosts.share(batch_sharding(mesh), config.rollout.prompts)
        prompts = hosts.to_global(jax.tree.map(lambda x: x[asked.held], prompt_batch(config)), mesh, asked)
        steps = [generate(params, prompts, step_key(0, step, ROLLOUT)) for step in range(2)]
        return [to_host(out) for out in steps], generate._cache_size()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(tmp_path_factory, devices: int, **more: str) -> dict[str, str]:
    """Of a process with so many devices. Its compilations are hurried: results stay, speed does not."""
    flags = f"--xla_force_host_platform_device_count={devices} {HURRIED_FLAGS}"
    return hurried_environment(tmp_path_factory) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | more


def side_by_side(folder: Path, commands: list[list[str]], env: dict[str, str]) -> list[tuple[int, str]]:
    """Runs Python with these arguments at one time. How each ended: its exit status, and all that it printed."""
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    with contextlib.ExitStack() as stack:
        processes = []
        for command, log in zip(commands, logs, strict=True):
            output, whole = stack.enter_context(open(log, "w")), [sys.executable, *command]
            processes.append(subprocess.Popen(whole, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        for process in processes:
            process.wait(TIME_LIMIT_S)
    return [(process.returncode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of two processes of tests/helpers/two_hosts.py, and what each printed if it failed."""
    folder, port = tmp_path_factory.mktemp("hosts"), str(free_port())
    commands = [["-m", "tests.helpers.two_hosts", str(folder), port, str(number)] for number in range(2)]
    ended = side_by_side(folder, commands, environment(tmp_path_factory, 4))
    return folder, [said if status else "" for status, said in ended]


@pytest.fixture(scope="module")
def folder(processes) -> Path:
    """Where the rollouts are."""
    folder, errors = processes
    assert all((folder / f"{name}-{process}.npz").exists() for name in DRAWN for process in range(2)), errors
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


@pytest.mark.parametrize("name", DRAWN)
def test_both_hosts_read_the_same(folder, name):
    first, second = (np.load(folder / f"{name}-{process}.npz") for process in range(2))
    assert set(first) == set(second)
    for field in first:
        np.testing.assert_array_equal(first[field], second[field])


@pytest.mark.parametrize("drawn", DRAWN)
def test_two_hosts_draw_what_one_device_draws(folder, single, drawn):
    """Whole arrays, of both steps, compiled once. One device has blocks."""
    found = np.load(folder / f"{drawn}-0.npz")
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


@pytest.mark.parametrize("mesh", MESHES)
def test_every_row_has_one_owner_among_its_holders(folder, mesh):
    shares = [json.loads((folder / f"shares-{process}.json").read_text())[mesh] for process in range(2)]
    held = {"rows": [[0, 1, 2, 3], [4, 5, 6, 7]], "turns": [[0, 2, 4, 6], [1, 3, 5, 7]], "shared": [list(range(8))] * 2}
    owned = {**held, "shared": [list(range(8)), []]}
    for process, share in enumerate(shares):
        assert share["held"] == held[mesh][process]
        assert share["owned"] == share["back"] == owned[mesh][process]
        assert share["of_owned"] == [str(row) for row in share["owned"]]
        assert share["placed"] == list(range(8))  # each process gave the rows that it holds, and no others
        assert share["gathered"] == [2 * row for row in range(8)]
        assert share["total"] == {"killed": 2, "failed": 8}
        assert share["all_names"] == ["both", "of process 0", "of process 1"]
        silent = {rows[-1] for rows in owned[mesh] if rows}  # the last row of each had no text
        assert share["texts"] == ["" if row in silent else str(row) for row in range(8)]


def test_one_process_owns_every_row_and_copies_none():
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    mine = hosts.share(batch_sharding(mesh), 6)
    numbers = np.arange(6)
    assert mine.held.tolist() == mine.owned.tolist() == numbers.tolist()
    assert mine.grouped(2).owned.tolist() == list(range(12)) and mine.grouped(2).size == 12
    assert hosts.to_global(numbers, mesh, mine) is numbers and hosts.gather(numbers, mine) is numbers


# --- whole runs, by the command line ---

# Counts what a process scores, one line a batch, and kills the process of DIE at its batch DIE_AT.
COUNTING = """
import os
import signal
from pathlib import Path

import jax

from dppo_jax.rewards.scorer import Scorer
from tests.devices.test_hosts import loop_config

FOLDER = Path({folder!r})
submit = Scorer.submit


def counted(self, replies, examples):
    file = FOLDER / f"scored-{{jax.process_index()}}-{{jax.process_count()}}.txt"
    with open(file, "a") as lines:
        lines.write(f"{{len(replies)}}\\n")
    if os.environ.get("DIE") == str(jax.process_index()) and len(file.read_text().split()) == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return submit(self, replies, examples)


Scorer.submit = counted


def get_config():
    return loop_config(FOLDER)
"""


def loop_config(folder: Path):
    """Parameters cut over both hosts, evaluation, the trained policy exported, and the next batch drawn early."""
    numbers = dict(rollout__slots=SLOTS, train__staleness=1, optimizer__eps=1e-4)
    return run_config(folder, steps=4, **numbers)


def train_command(folder: Path, *flags: str) -> list[str]:
    return ["-m", "experiments.train", "--config", str(folder / "config.py"), "--workdir", str(folder / "run"), *flags]


def pair(folder: Path) -> list[list[str]]:
    """The two commands of one run."""
    meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2", "--peer_timeout", "5"]
    return [train_command(folder, *meeting, "--process_id", str(number)) for number in range(2)]


def prepared(tmp_path_factory, name: str) -> Path:
    folder = tmp_path_factory.mktemp(name)
    shutil.copytree(tiny(tmp_path_factory), folder, dirs_exist_ok=True)
    (folder / "config.py").write_text(COUNTING.format(folder=str(folder)))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[tuple[int, str]], list[tuple[int, str]]]:
    """Where two processes ran, how they ended when the second was killed in its last step, and how when run again."""
    folder = prepared(tmp_path_factory, "pair")
    first = side_by_side(folder, pair(folder), environment(tmp_path_factory, 4, DIE="1", DIE_AT="10"))
    return folder, first, side_by_side(folder, pair(folder), environment(tmp_path_factory, 4))


def test_a_lost_peer_ends_the_other_with_a_sentence(killed):
    _, ((status, said), (dead, _)), _ = killed
    assert dead == -signal.SIGKILL and status == peers.LOST, said
    assert "error: process 1 was lost: no heartbeat for 5 s; so process 0 ends too; started again" in said
    assert "stack trace" not in said and "Traceback" not in said


def test_started_again_both_go_on_from_the_last_checkpoint(killed):
    folder, _, again = killed
    assert [status for status, _ in again] == [0, 0], again
    assert "going on from the checkpoint at step 2" in again[0][1]
    assert "reward/mean" in again[0][1] and "reward/mean" not in again[1][1]  # one of them has the last word


def test_each_host_scores_its_own_rows(killed):
    folder, *_ = killed
    first, second = ((folder / f"scored-{process}-2.txt").read_text().split() for process in range(2))
    # 16 of 32 in training, 8 of 16 in evaluation; its last batch has 2 prompts, and the first host holds both.
    assert first[:4] == ["8", "8", "4", "16"] and second[:4] == ["8", "8", "0", "16"]
    assert set(first) == {"8", "4", "16"} and set(second) == {"8", "0", "16"}


def test_one_of_them_writes(killed):
    folder, *_ = killed
    assert len(event_files(folder / "run")) == 2  # one a start
    assert read_config(folder / "run")["steps"] == 4
    assert sorted(file.name for file in (folder / "run" / "samples").iterdir()) == [
        "step_000000.jsonl",
        "step_000002.jsonl",
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, Path]:
    """The same run in one process of eight devices, and of one."""
    folder = prepared(tmp_path_factory, "alone")
    [(status, said)] = side_by_side(folder, [train_command(folder)], environment(tmp_path_factory, 8))
    assert status == 0, said
    with hurried(tmp_path_factory):
        single = run(loop_config(tiny(tmp_path_factory)), tmp_path_factory.mktemp("single") / "run")
    return {8: folder / "run", 1: single.folder}


@pytest.mark.parametrize("devices", [8, 1])
def test_two_hosts_train_as_one_process(killed, alone, devices):
    """Killed and resumed on the way: the same metrics and the same policy."""
    folder, *_ = killed
    found, want = read_scalars(folder / "run"), read_scalars(alone[devices])
    assert found.keys() == want.keys() and "eval/sums/avg" in found
    for tag, (steps, values) in want.items():
        np.testing.assert_array_equal(found[tag][0], steps)
        # A shard's slots wait for its own rows: what a rollout costs depends on how many shards there are.
        of_the_mesh = () if devices == 8 else ("rollout/decode_steps", "rollout/pages_", "rollout/occupancy")
        if not tag.startswith((*MACHINE, *of_the_mesh)):
            np.testing.assert_allclose(found[tag][1], values, rtol=1e-4, atol=1e-6, err_msg=tag)
    policies = (load_params(at / "policy")[1] for at in (folder / "run", alone[devices]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), *policies)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, list[str], list[tuple[int, str]]]:
    """Where two processes evaluated, the parts that were there when the second was killed in its second batch, and how
    both ended when run again. Each has a results file of its own name."""
    folder = prepared(tmp_path_factory, "evaluated")

    def both() -> list[list[str]]:
        meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2", "--peer_timeout", "5"]
        command = ["-m", "experiments.eval", "--config", str(folder / "config.py"), "--policy", str(folder / "model")]
        return [
            [*command, *meeting, "--process_id", str(n), "--results", str(folder / f"results-{n}.parquet")]
            for n in range(2)
        ]

    side_by_side(folder, both(), environment(tmp_path_factory, 4, DIE="1", DIE_AT="2"))
    parts = sorted(path.name for path in (folder / "results-0.parquet.parts").glob("*.parquet"))
    return folder, parts, side_by_side(folder, both(), environment(tmp_path_factory, 4))


def test_two_hosts_evaluate_as_one_process_and_one_of_them_writes(evaluated, tmp_path_factory):
    folder, parts, ended = evaluated
    assert parts == ["sums-000000.parquet"] and [status for status, _ in ended] == [0, 0], ended
    assert "eval.sets.sums: 1 of 3 batches are in" in ended[0][1] and "batches are in" not in ended[1][1]
    assert not list(folder.glob("results-1*")) and not list(folder.glob("*.parts"))
    path = folder / "alone.parquet"
    with hurried(tmp_path_factory):
        metrics = evaluate(loop_config(folder), policy_name=str(folder / "model"), results=path)
    assert read_table(folder / "results-0.parquet").to_pylist() == read_table(path).to_pylist()
    printed = dict(line.split() for line in ended[0][1].splitlines() if line.startswith("eval/"))
    assert printed == {name: f"{value:.4g}" for name, value in metrics.items()}


# With rows in flight, an environment that hangs once and fails once, and a group of rows on every device.
TALKS = dict(
    data__kind="environment", data__name=f"{ROOT / 'tests/helpers/talk.py'}:Talk", data__path="", data__verifier="task",
    data__size=24, data__settings={"bad": {"2": "raise", "9": "hang"}}, reward__time_limit_s=5.0, steps=3,
    rollout__prompts=8, rollout__group_size=2, rollout__max_new_tokens=24, rollout__turn_tokens=5, rollout__in_flight=1,
    rollout__max_age=3, rollout__slots=8, optimizer__eps=1e-4,
)  # fmt: skip


@pytest.mark.slow
def test_two_hosts_talk_as_one_process(tmp_path_factory):
    ran = []
    for count in (2, 1):
        folder = tmp_path_factory.mktemp("talks")
        shutil.copytree(tiny(tmp_path_factory), folder, dirs_exist_ok=True)
        config_file(folder / "config.py", folder, **TALKS)
        commands = pair(folder) if count == 2 else [train_command(folder)]
        ended = side_by_side(folder, commands, environment(tmp_path_factory, 8 // count))
        assert {status for status, _ in ended} == {0}, ended
        ran.append(folder / "run")
    found, want = map(read_scalars, ran)
    assert found.keys() == want.keys() and want["rollout/turns_mean"][1].max() > 1
    assert want["reward/failed"][1].sum() > 0 and want["rollout/in_flight"][1].max() > 0
    for tag, (_, values) in want.items():
        if not tag.startswith(MACHINE):
            np.testing.assert_allclose(found[tag][1], values, rtol=1e-4, atol=1e-6, err_msg=tag)


# --- how they meet and part ---

MEMBER = """
import sys
import time

from dppo_jax.errors import UserError
from dppo_jax.devices import peers


def main():
    parser = __import__("argparse").ArgumentParser()
    for name, options in peers.FLAGS.items():
        parser.add_argument(name, **options)
    parser.add_argument("--then")
    arguments = parser.parse_args()
    peers.join(arguments)
    if arguments.then == "refuse":
        raise UserError("this host has no data")
    if arguments.then == "die":
        time.sleep(1)
        __import__("os").kill(__import__("os").getpid(), 9)
    if arguments.then == "stop":
        time.sleep(1)
        __import__("os").kill(__import__("os").getpid(), 19)
    if arguments.then == "wait":
        time.sleep(100)
    if arguments.then.startswith("seed="):
        from experiments.run.identity import same_config_everywhere
        from tests.helpers.fixtures import small_config
        from pathlib import Path

        same_config_everywhere(small_config(Path("m"), seed=int(arguments.then[5:]), compile_cache=arguments.then))


peers.run_main(main)
"""


def members(tmp_path_factory, *then: str, count: int | None = None) -> list[tuple[int, str]]:
    """Processes that join each other and then do as they are told."""
    folder, port = tmp_path_factory.mktemp("members"), free_port()
    meeting = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(count or len(then))]
    meeting += ["--peer_timeout", "5", "--join_timeout", "3" if count else "60"]
    commands = [
        ["-c", MEMBER, *meeting, "--process_id", str(number), "--then", what] for number, what in enumerate(then)
    ]
    return side_by_side(folder, commands, environment(tmp_path_factory, 1))


def test_the_coordinator_is_lost(tmp_path_factory):
    (dead, _), (status, said) = members(tmp_path_factory, "die", "wait")
    assert dead == -signal.SIGKILL and status == peers.LOST
    assert "was lost; so process 1 ends too; started again" in said.splitlines()[-1]


def test_the_coordinator_is_stopped(tmp_path_factory):
    """Its machine still takes connections; nothing in it answers any more."""
    folder, port = tmp_path_factory.mktemp("stopped"), free_port()
    meeting = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", "2", "--peer_timeout", "5"]
    commands = [
        [sys.executable, "-c", MEMBER, *meeting, "--process_id", str(number), "--then", then]
        for number, then in enumerate(("stop", "wait"))
    ]
    env = environment(tmp_path_factory, 1)
    with open(folder / "said", "wb") as said:
        stopped, other = (subprocess.Popen(command, cwd=ROOT, env=env, stderr=said) for command in commands)
        try:
            assert other.wait(TIME_LIMIT_S) == peers.LOST
        finally:
            stopped.kill()
            other.kill()
    assert "so process 1 ends too; started again" in (folder / "said").read_text(errors="replace").splitlines()[-1]


def test_hosts_that_were_started_with_different_configs(tmp_path_factory):
    """Their places may differ; their seeds may not."""
    ended = members(tmp_path_factory, "seed=3", "seed=4")
    assert [status for status, _ in ended] == [2, 2]
    for _, said in ended:
        assert said.splitlines()[-1] == (
            "error: process 1 has another config than process 0 (there, against process 1, here): "
            "seed is 3 there and 4 here; start all hosts with the same"
        )


@pytest.mark.parametrize("then", [("refuse", "wait"), ("wait", "refuse")])
def test_why_one_host_fails_is_said_by_all(tmp_path_factory, then):
    ended = members(tmp_path_factory, *then)
    first = then.index("refuse")
    assert ended[first][0] == 2 and "error: this host has no data" in ended[first][1].splitlines()
    assert ended[1 - first][0] == peers.LOST
    assert f"process {first} stopped: this host has no data; so process {1 - first} ends" in ended[1 - first][1]


def test_all_finish(tmp_path_factory):
    ended = members(tmp_path_factory, "finish", "finish")
    assert [status for status, _ in ended] == [0, 0]
    assert not any("error" in said for _, said in ended)


def test_a_host_that_never_comes(tmp_path_factory):
    [(status, said)] = members(tmp_path_factory, "wait", count=2)
    assert status == 2
    assert said.splitlines()[-1].endswith(": not all of them came within 3 s") and "stack trace" not in said


REFUSED = {
    "--num_processes and --process_id must be given too, or --distributed": ["--coordinator", "a:1"],
    "--coordinator must be HOST:PORT, not 'a'": ["--coordinator", "a", "--num_processes", "2", "--process_id", "0"],
    "--process_id must be from 0 to --num_processes - 1, not 2 of 2": [
        "--coordinator", "a:1", "--num_processes", "2", "--process_id", "2",
    ],
    "--num_processes must be a whole number, not 'two'": [
        "--coordinator", "a:1", "--num_processes", "two", "--process_id", "0",
    ],
    "--process_id is 1, but JAX_PROCESS_ID is 0; leave one of them out": ["--distributed", "--process_id", "1"],
    "--peer_timeout must be at least 1 second, not 0": ["--distributed", "--peer_timeout", "0"],
}  # fmt: skip


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, options in peers.FLAGS.items():
        parser.add_argument(name, **options)
    return parser.parse_args(flags)


@pytest.mark.parametrize("sentence", REFUSED)
def test_settings_that_cannot_be_meant(sentence):
    environment = {"JAX_PROCESS_ID": "0"} if "JAX_" in sentence else {}
    with pytest.raises(UserError) as error:
        peers.settings(parsed(*REFUSED[sentence]), environment)
    assert sentence in str(error.value)


def test_where_the_settings_come_from():
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert peers.settings(parsed(), environment) is None  # without a flag, a process is on its own
    assert peers.settings(parsed("--distributed"), environment) == ("a:1", 4, 3)
    assert peers.settings(parsed("--distributed"), {}) == (None, None, None)
    assert peers.settings(parsed("--coordinator", "b:2", "--num_processes", "5", "--process_id", "4"), {}) == (
        "b:2", 5, 4,
    )  # fmt: skip
