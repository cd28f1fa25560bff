"""What a run logs of its speed, its memory and its time, a trace of a step, and W&B's log of a whole run."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from dppo_jax.devices.chips import peak_of
from dppo_jax.devices.usage import Usage, started
from dppo_jax.models import load_policy
from dppo_jax.models.flops import layer_weights
from dppo_jax.storage.run_log import read_scalars
from experiments import sft
from experiments.run import disk
from experiments.run.phases import PHASES, Phases
from tests.helpers import wandb_files
from tests.helpers.fixtures import Run, finished_run, hurried, run, same, small_config, tiny

ROWS = 32  # a step's
SHARES = {f"time_share/{name}" for name in PHASES}


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """Runs that show every reply of every step."""

    def start(**changes) -> Run:
        config = small_config(folder, log__samples=1, log__transcripts=ROWS, log__histograms=0, **changes)
        return run(config, tmp_path_factory.mktemp("logs") / "run")

    return start


@pytest.fixture(scope="module")
def plain(start) -> Run:
    return start(steps=3, checkpoint__every=1)


@pytest.fixture(scope="module")
def in_flight(start) -> Run:
    return start(steps=3, rollout__in_flight=1, rollout__slots=8)


@pytest.fixture(scope="module")
def early(start) -> Run:
    return start(steps=3, train__staleness=1)


def lengths(a: Run, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts and of the responses of a step; a token a character, and one for the end."""
    file = a.folder / "samples" / f"step_{step:06d}.jsonl"
    shown = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(shown) == ROWS
    replies = [min(len(row["reply"]) + 1, a.config.rollout.max_new_tokens) for row in shown]
    return np.array([len(row["prompt"]) for row in shown]), np.array(replies)


# --- operations ---


def by_hand(a: Run, step: int) -> tuple[float, float]:
    """Operations of the rollout and of the update, token by token."""
    model = load_policy(Path(a.config.policy.path)).config
    weights, head = 2 * model.num_layers * layer_weights(model), 2 * model.vocab_size * model.hidden_size
    pair = 4 * model.num_layers * model.num_heads * model.head_dim
    rollout = update = 0.0
    for row, (prompt, response) in enumerate(zip(*lengths(a, step), strict=True)):
        if row % a.config.rollout.group_size == 0:
            rollout += prompt * weights + head + sum(pair * seen for seen in range(1, prompt + 1))
        rollout += sum(weights + head + pair * (prompt + n) for n in range(1, response))
        whole = prompt + response
        update += 3 * (whole * weights + response * head + sum(pair * seen for seen in range(1, whole + 1)))
    return rollout, update


def seconds(scalars, step: int) -> dict[str, float]:
    return {name: scalars[f"time/{name}"][1][step] for name in ("rollout", "reward", "train")}


def test_operations_by_the_second_are_those_of_the_real_tokens(plain):
    scalars = read_scalars(plain.folder)
    for step in range(3):
        rollout, update = by_hand(plain, step)
        took = seconds(scalars, step)
        whole = sum(took.values())
        found = {tag: scalars[f"throughput/{tag}"][1][step] for tag in ("tflops_per_chip", "tokens_per_s")}
        assert found["tflops_per_chip"] * 1e12 * whole == pytest.approx(rollout + update, rel=1e-3)
        assert found["tokens_per_s"] * whole == pytest.approx(lengths(plain, step)[1].sum(), rel=1e-4)
        for part, flops in (("rollout", rollout), ("update", update)):
            per_second = scalars[f"throughput/{part}_tflops_per_chip"][1][step] * 1e12
            assert per_second * took[part.replace("update", "train")] == pytest.approx(flops, rel=1e-3)
    assert "throughput/mfu" not in scalars  # nobody says what a CPU can do


def test_the_operations_of_rows_in_flight_are_those_of_the_tokens_drawn(in_flight):
    """Over the whole run what was drawn is what was trained."""
    scalars = read_scalars(in_flight.folder)
    found = [scalars["throughput/tflops_per_chip"][1][s] * sum(seconds(scalars, s).values()) for s in range(3)]
    assert sum(found) * 1e12 == pytest.approx(sum(sum(by_hand(in_flight, step)) for step in range(3)), rel=0.05)


def test_a_rollout_that_overlaps_the_update_has_no_rate_of_its_own(early):
    scalars = read_scalars(early.folder)
    assert {tag for tag in scalars if tag.startswith("throughput/")} == {
        "throughput/tokens_per_s", "throughput/tokens_per_s_per_chip", "throughput/tflops_per_chip",
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, peak",
    [("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA H100 PCIe", None), ("cpu", None)],
)  # fmt: skip
def test_the_peak_of_a_chip_is_known_by_its_kind(kind, peak):
    assert peak_of(kind) == peak


# --- slots, memory ---


def test_occupancy_is_the_share_of_slots_with_rows(plain, in_flight):
    scalars = read_scalars(plain.folder)
    for step in range(3):
        drawn = (lengths(plain, step)[1] - 1).sum()  # the first token comes with the prompt
        slots = scalars["rollout/decode_steps"][1][step] * ROWS
        assert scalars["rollout/occupancy"][1][step] * slots == pytest.approx(drawn, rel=1e-5)
    shares = read_scalars(in_flight.folder)["rollout/occupancy"][1]
    assert ((0 < shares) & (shares <= 1)).all() and shares[0] > scalars["rollout/occupancy"][1][0]


def test_memory_is_logged_as_far_as_the_platform_tells(plain):
    scalars, stats = read_scalars(plain.folder), jax.devices()[0].memory_stats()
    assert (scalars["memory/host_gib"][1] > 0.1).all() and (scalars["memory/host_gib"][1] < 1000).all()
    assert ("memory/peak_gib" in scalars) == ("memory/limit_gib" in scalars) == (stats is not None)
    assert (scalars["memory/handles"][1] > 3).all() and (scalars["memory/threads"][1] > 1).all()


def test_the_processes_that_were_started_count_with_those_that_they_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    usage, before = Usage(), len(started())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        while len(started(process.pid)) < 1:
            time.sleep(0.01)
        assert len(started()) == before + 2
        found = usage.memory()
        assert found["memory/workers_started"] == before + 2 and found["memory/workers_gib"] > 0.005
        process.communicate(b"\n")
    again = usage.memory()
    assert len(started()) == before and again["memory/workers_started"] == before + 2


# --- the disk ---


def on_disk(folder: Path, *names: str) -> int:
    found = [path for name in names for path in (folder / name, *(folder / name).rglob("*"))]
    return sum(path.stat().st_size for path in found if path.is_file())


def test_what_will_be_on_the_disk_is_told_and_it_is_so(finished):
    (line,) = [line for line in finished.said.splitlines() if line.startswith("disk: ")]
    number = r"([0-9.]+ [kMGT]B)"
    told = re.fullmatch(
        f"disk: at most 2 checkpoints of {number}, a model of {number}, about {number} of logs and samples per "
        f"1,000 steps; {number} in all, and {number} are free",
        line,
    )
    of = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    state, model, logs, whole, _ = (float(text.split()[0]) * of[text.split()[1]] for text in told.groups())
    assert 0.5 < on_disk(finished.folder, "checkpoints/4") / state < 1.5
    assert 0.5 < on_disk(finished.folder, "policy") / model < 1.5
    steps = finished.config.steps
    assert 0.3 < on_disk(finished.folder, "tb", "samples", "scalars.jsonl") / (logs * steps / 1000) < 3
    assert whole == pytest.approx(2 * state + model + logs * steps / 1000, rel=0.02)


@pytest.mark.parametrize(
    "changes, most",
    [
        (dict(steps=100, checkpoint__every=0), 1),
        (dict(steps=100, checkpoint__every=10, checkpoint__keep=2), 3),  # with the one that is being written
        (dict(steps=100, checkpoint__every=60, checkpoint__keep=9), 2),
        (dict(steps=100, checkpoint__every=10, checkpoint__keep=2, checkpoint__keep_every=50), 5),
        (dict(steps=100, checkpoint__every=10, checkpoint__keep=2, checkpoint__best="reward/mean"), 4),
        (dict(steps=100, checkpoint__every=0, checkpoint__every_s=60.0, checkpoint__keep=2), 3),
    ],
)
def test_how_many_checkpoints_there_may_be(folder, changes, most):
    assert disk.most_checkpoints(small_config(folder, **changes)) == most


def test_a_disk_that_has_too_little_room_is_told(folder, tmp_path):
    config = small_config(folder, steps=100, checkpoint__every=10, checkpoint__keep=2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "file").write_bytes(bytes(1000))
    said, warning = disk.sentences(config, tmp_path, [tmp_path], 10**18, 0)
    assert said.startswith("disk: at most 3 checkpoints of 1e+06 TB, about ")
    assert warning.startswith(f"warning: the run may need 3e+06 TB more on the disk of {tmp_path}, which has ")
    assert warning.endswith("lower checkpoint.keep, raise log.samples, or take another --workdir")
    for every, advice in ((50, "raise checkpoint.keep_every or log.samples"), (0, "lower checkpoint.keep")):
        config.checkpoint.keep_every = config.log.samples = every
        warning = list(disk.sentences(config, tmp_path, [tmp_path], 10**18, 0))[1]
        assert f"{advice}, or take another" in warning
    assert len(list(disk.sentences(config, tmp_path, [tmp_path], 1000, 0))) == 1


# --- shares of time ---


@pytest.mark.parametrize("name", ["finished", "plain", "in_flight", "early"])
def test_the_shares_of_a_step_add_up_to_one(name, request):
    scalars = read_scalars(request.getfixturevalue(name).folder)
    shares = {tag: scalars[tag][1] for tag in scalars if tag.startswith("time_share/")}
    assert shares.keys() == SHARES
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-6)
    assert all((values >= 0).all() for values in shares.values())
    for of_every_step in ("rollout", "train", "log"):
        assert (shares[f"time_share/{of_every_step}"] > 0).all()
    assert (shares["time_share/idle"] < 0.2).all()


def test_evaluations_and_checkpoints_have_the_time_of_their_steps(finished):
    """Evaluations before steps 0 and 2; a checkpoint after step 1, which falls into the next."""
    scalars = read_scalars(finished.folder)
    evaluation, checkpoint = (scalars[f"time_share/{name}"][1] for name in ("evaluation", "checkpoint"))
    assert evaluation[[0, 2]].min() > 10 * evaluation[[1, 3]].max()
    assert checkpoint[2] > 10 * checkpoint[[1, 3]].max()


def test_the_innermost_phase_has_the_time():
    phases = Phases()
    with phases("rollout"), phases("log"):
        time.sleep(0.2)
    with pytest.raises(RuntimeError), phases("reward"):
        raise RuntimeError
    time.sleep(0.2)
    first, second = phases.shares(), phases.shares()
    assert sum(first.values()) == pytest.approx(1) == sum(second.values()) and first.keys() == SHARES
    assert first["time_share/log"] > 0.2 < first["time_share/idle"] and first["time_share/rollout"] < 0.1
    assert second["time_share/idle"] == 1


def test_supervised_fine_tuning_logs_the_same(folder, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "0+1=", "completion": "1"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(folder, data__path=str(tmp_path / "rows.jsonl"), sft__batch=2, sft__epochs=2)
    sft.tune(config, tmp_path / "run")
    scalars = read_scalars(tmp_path / "run")
    assert (sum(scalars[tag][1] for tag in SHARES) == pytest.approx(1)) and (scalars["time_share/train"][1] > 0).all()
    assert (scalars["throughput/tflops_per_chip"][1] > 0).all() and (scalars["memory/host_gib"][1] > 0).all()
    counts = [tag for tag in scalars if tag.startswith("data/")]
    assert counts and all(scalars[tag][0].tolist() == [0] for tag in counts)


# --- a trace of a step ---


def traces(a: Path) -> list[Path]:
    return sorted(a.glob("tb/plugins/profile/*/*.xplane.pb"))


def programs(trace: Path) -> set[str]:
    """The compiled programs whose operations are in a trace."""
    planes = ProfileData.from_file(str(trace)).planes
    stats = (dict(event.stats) for plane in planes for line in plane.lines for event in line.events)
    return {str(found["hlo_module"]) for found in stats if "hlo_op" in found and "hlo_module" in found}


def test_a_traced_step_has_its_operations_and_changes_no_number(start, plain):
    traced = start(steps=3, checkpoint__every=1, log__profile_step=1)
    (trace,) = traces(traced.folder)
    names = programs(trace)
    assert any("rollout" in name for name in names) and any("update" in name for name in names), names
    assert "step 1 is traced" in traced.said and not traces(plain.folder)
    same(plain.folder, traced.folder)


def test_a_run_that_goes_on_at_the_traced_step_traces_the_next(plain, tmp_path):
    """Its first step compiles."""
    again = tmp_path / "run"
    shutil.copytree(plain.folder, again)
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / str(step))
    config = plain.config.copy_and_resolve_references()
    config.log.profile_step = 1
    assert "step 2 is traced" in run(config, again).said and len(traces(again)) == 1
    same(plain.folder, again)


# --- W&B ---


def test_wandb_has_every_scalar_of_a_run(start, plain, tmp_path, monkeypatch):
    wandb_files.offline(monkeypatch, tmp_path)
    logged = start(steps=3, checkpoint__every=1, log__wandb="regions")
    same(plain.folder, logged.folder)
    (found,) = wandb_files.processes(logged.folder)
    history, lines = wandb_files.rows(found), (logged.folder / "scalars.jsonl").read_text().splitlines()
    for tag, (steps, values) in read_scalars(logged.folder).items():
        assert [row["_step"] for row in history if tag in row] == steps.tolist()
        for rows in (history, map(json.loads, lines)):
            np.testing.assert_array_equal(np.float32([row[tag] for row in rows if tag in row]), np.float32(values))
    assert [row["_step"] for row in history if "samples/path" in row] == [0, 1, 2]
