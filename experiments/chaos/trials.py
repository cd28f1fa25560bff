"""One kind of run, killed and damaged again and again, against the undisturbed one."""

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from ml_collections import ConfigDict

from dppo_jax.devices import peers
from dppo_jax.errors import UserError
from dppo_jax.files import Path, is_bucket, read_json
from dppo_jax.storage.run_log import MACHINE, read_scalars
from experiments.chaos.instants import JITTER_S, WHERE, Instant
from experiments.chaos.processes import start, wait

# What a run's state may hold, as changes of the config; two_hosts and bucket change where it runs.
KINDS: dict[str, dict] = {
    "plain": {},
    "staleness": {"train.staleness": 1},
    "lag": {"rollout.lag": 3},
    "in_flight": {"rollout.in_flight": 2, "rollout.max_age": 3},
    "lora": {"lora.rank": 2},
    "critic": {"advantage.name": "gae"},
    "two_hosts": {},
    "bucket": {},
}
AGAIN = 0.25  # of the kills are followed by one while the run starts again
TERM = 0.1  # of the ends are by SIGTERM: the run saves, and loses nothing
DAMAGED = 0.15  # of the kills are followed by a flipped byte in the newest checkpoint


@dataclass
class Outcome:
    """Of one kind. `failures` are sentences; none: every expectation was met."""

    kind: str
    ends: dict[str, int] = field(default_factory=dict)  # by instant and signal
    resumes: int = 0
    damaged: int = 0
    most_lost: int = 0  # steps that one kill cost
    rounds: int = 0  # runs that were finished
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def trial(kind: str, config: ConfigDict, workdir: Path, kills: int, seed: int, log: str) -> Outcome:
    """Runs one kind undisturbed once, and then again with so many kills. UserError where it fails undisturbed."""
    draw, outcome, begun = random.Random(f"{seed} {kind}"), Outcome(kind), time.monotonic()
    hosts = 2 if kind == "two_hosts" else 1
    whole = workdir / "undisturbed"
    (*_, status) = wait(start(config, whole, log, hosts, None))
    if status:
        raise UserError(f"{kind}: the undisturbed run ended with {status}; {log} has what it said")
    per_step_s = _seconds_per_step(whole)
    done = 0
    while done < kills and not outcome.failures:
        folder = workdir / f"round_{outcome.rounds}"
        done += _round(draw, config, folder, whole, log, hosts, kills - done, per_step_s, outcome)
        outcome.rounds += 1
    outcome.seconds = round(time.monotonic() - begun, 1)
    return outcome


def _round(
    draw: random.Random, config: ConfigDict, folder: Path, whole: Path, log: str, hosts: int, most: int,
    per_step_s: float, outcome: Outcome,
) -> int:  # fmt: skip
    """A run with at most so many kills, to its end; how many they were."""
    done, again = 0, False
    while True:
        instant = None if done == most else _instant(draw, config, per_step_s, again)
        before = _steps(folder)
        statuses = wait(start(config, folder, log, hosts, instant))
        if instant is None or statuses == [0] * hosts:
            break
        expected = -instant.signal if instant.signal == signal.SIGKILL else None
        if None in statuses or statuses[-1] == 1 or (expected and statuses[-1] != expected):
            outcome.failures.append(f"{folder}: ended with {statuses} after {instant}")
            return done + 1
        if hosts > 1 and instant.signal == signal.SIGKILL and statuses[0] != peers.LOST:
            outcome.failures.append(f"{folder}: the other host ended with {statuses[0]}, not {peers.LOST}")
        done, name = done + 1, f"{instant.where} {signal.Signals(instant.signal).name}"
        outcome.ends[name] = outcome.ends.get(name, 0) + 1
        outcome.resumes += 1
        kept = _steps(folder)
        if instant.where != "start":
            outcome.most_lost = max(outcome.most_lost, _logged(folder) - max(kept, default=0))
        again = instant.where != "start" and draw.random() < AGAIN
        if len(kept) > 1 and kept != before and draw.random() < DAMAGED and _damage(draw, folder, kept[-1]):
            outcome.damaged += 1
    if any(status != 0 for status in statuses):
        outcome.failures.append(f"{folder}: the last start ended with {statuses}")
    else:
        outcome.failures += [f"{folder}: {what}" for what in differences(whole, folder)]
    return done


def _seconds_per_step(folder: Path) -> float:
    """The median over its steps, without what compiles."""
    scalars = read_scalars(folder)
    return float(np.median(np.sum([scalars[f"time/{part}"][1] for part in ("rollout", "reward", "train")], axis=0)))


def _instant(draw: random.Random, config: ConfigDict, per_step_s: float, again: bool) -> Instant:
    if again:
        return Instant("start", draw.uniform(0.0, 3.0), 0.0)
    where, every = draw.choice(WHERE), max(config.checkpoint.every, 1)
    after_s = draw.uniform(0.0, 2.5 * every * per_step_s)
    how = signal.SIGTERM if where == "anywhere" and draw.random() < TERM * len(WHERE) else signal.SIGKILL
    return Instant(where, after_s, draw.uniform(0.0, JITTER_S[where]), how)


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints, by name."""
    found = folder / "checkpoints"
    return sorted(int(path.name) for path in found.iterdir() if path.name.isdigit()) if found.is_dir() else []


def _logged(folder: Path) -> int:
    """Steps that the log has."""
    try:
        return len(read_scalars(folder)["reward/mean"][0])
    except (UserError, KeyError, OSError):
        return 0


def _damage(draw: random.Random, folder: Path, step: int) -> bool:
    """Flips a bit of one file of a checkpoint; False in a bucket, whose own checksums tell."""
    if is_bucket(folder):
        return False
    files = sorted(read_json(folder / "checkpoints" / str(step) / "manifest.json")["files"])
    path = folder / "checkpoints" / str(step) / draw.choice(files)
    data = bytearray(path.read_bytes())
    if not data:
        return False
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    return True


def differences(one: Path, two: Path) -> Iterator[str]:
    """What is not the same in the logs of two runs, but for the machine's tags: bit for bit."""
    first, second = read_scalars(one), read_scalars(two)
    if first.keys() != second.keys():
        yield f"other tags are logged: {sorted(first.keys() ^ second.keys())[:5]}"
    for tag in sorted(first.keys() & second.keys()):
        if tag.startswith(MACHINE):
            continue
        (steps, values), (other_steps, others) = first[tag], second[tag]
        if list(steps) != list(other_steps):
            yield f"{tag} is logged at other steps"
        elif not np.array_equal(values, others, equal_nan=True):
            at = next(step for step, x, y in zip(steps, values, others, strict=True) if x != y)
            yield f"{tag} differs from step {at} on"
