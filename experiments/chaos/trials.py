"""One kind of run, killed and damaged again and again, against the undisturbed one."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ml_collections import ConfigDict

from dppo_jax.devices import peers
from dppo_jax.errors import Stopped, UserError
from dppo_jax.files import Path, is_bucket, read_json
from experiments.chaos.compare import differences, logged, steps_of
from experiments.chaos.instants import JITTER_S, WHERE, Instant
from experiments.chaos.processes import found, start, wait

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
MOST_WHOLE = 5  # runs more than kills, until it is told that they end before they are killed
DAMAGED = 0.15  # of the kills are followed by a flipped bit in the newest checkpoint


@dataclass
class Outcome:
    """Of the kills of one kind. `failures` are sentences; none: every expectation was met."""

    kind: str
    ends: dict[str, int] = field(default_factory=dict)  # by instant and signal
    resumes: int = 0
    resumed_saved: int = 0  # of them, those that had a checkpoint
    damaged: int = 0
    most_lost: int = 0  # steps that one kill cost
    rounds: int = 0  # runs that were finished
    failures: list[str] = field(default_factory=list)
    undisturbed_s: float = 0.0
    seconds: float = 0.0


class Ended(NamedTuple):
    """How one start ended, by host, and what all of them said."""

    statuses: list[int | None]
    said: str


@dataclass
class Trial:
    """A kind, and its undisturbed run, made by `begin`. The folder may be in a bucket, the log may not."""

    kind: str
    config: ConfigDict
    folder: Path
    seed: int
    log: str

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{self.seed} {self.kind}")
        self.hosts = 2 if self.kind == "two_hosts" else 1
        self.whole = self.folder / "undisturbed"
        self.outcome = Outcome(self.kind)
        self.every = self.config.checkpoint.every

    def begin(self) -> None:
        """UserError where the run fails undisturbed."""
        begun = time.monotonic()
        ended = self.run(self.whole)
        if ended.statuses != [0] * self.hosts:
            raise UserError(f"{self.kind}: undisturbed, it ended with {ended.statuses}; {self.log} has what it said")
        self.outcome.undisturbed_s = round(time.monotonic() - begun, 1)

    def run(
        self, folder: Path, instant: Instant | None = None, before: Callable[[], None] = lambda: None
    ) -> Ended:
        """Begins or goes on with a run, whose last host gets its signal at the instant."""
        had = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        instants = {self.hosts - 1: instant} if instant else {}
        statuses = wait(start(self.config, folder, self.log, self.hosts, instants, before))
        return Ended(statuses, self.said_since(had))

    def said_since(self, size: int) -> str:
        """What was added to the log since it had so many bytes."""
        with open(self.log, "rb") as file:
            file.seek(size)
            return file.read().decode(errors="replace")

    def finish(self, folder: Path, before: Callable[[], None] = lambda: None) -> list[str]:
        """Goes on to the run's end; in what it is not the undisturbed one."""
        statuses = self.run(folder, None, before).statuses
        ended = statuses == [0] * self.hosts
        return self.compared(folder) if ended else [f"{folder}: the last start ended with {statuses}"]

    def compared(self, folder: Path) -> list[str]:
        return [f"{folder}: {what}" for what in found(differences, self.whole, folder)]

    def kill(self, kills: int) -> None:
        """Runs it again with so many kills."""
        begun, done, outcome = time.monotonic(), 0, self.outcome
        while done < kills and not outcome.failures:
            more = self._round(self.folder / f"round_{outcome.rounds}", kills - done)
            done, outcome.rounds = done + more, outcome.rounds + 1
            if not more and outcome.rounds > done + MOST_WHOLE:
                outcome.failures.append(f"{self.folder}: the runs are too short to be killed {kills} times")
        outcome.seconds = round(time.monotonic() - begun, 1)

    def _round(self, folder: Path, most: int) -> int:
        """A run with at most so many kills, to its end; how many they were."""
        again = damaged = False
        for done in range(most):
            before = found(steps_of, folder)
            instant = self._instant(again, bool(before))
            statuses = self.run(folder, instant).statuses
            if not any(statuses):  # it had no step left for its instant
                self.outcome.failures += self.compared(folder)
                return done
            self._judge(folder, statuses, instant)
            self.outcome.resumes += 1
            kept = found(steps_of, folder)
            self.outcome.resumed_saved += bool(kept)
            if instant.where != "start" and not damaged:
                self._count_lost(folder, found(logged, folder) - max(kept, default=0), instant)
            again = instant.where != "start" and self.draw.random() < AGAIN
            damaged = len(kept) > 1 and kept != before and self.draw.random() < DAMAGED
            if damaged := damaged and found(damage, self.draw.random(), folder, kept[-1]) is not None:
                self.outcome.damaged += 1
            if self.outcome.failures:
                return done + 1
        self.outcome.failures += self.finish(folder)
        return most

    def _instant(self, again: bool, saved: bool) -> Instant:
        """The first of a run comes after its second save has begun, for which the first one was waited for."""
        if again:
            return Instant("start", self.draw.uniform(0.0, max(1.0, self.outcome.undisturbed_s / 4)))
        where = self.draw.choice(WHERE)
        how = signal.SIGTERM if where == "anywhere" and self.draw.random() < TERM * len(WHERE) else signal.SIGKILL
        after = self.draw.randint(0, 2 * self.every) + (0 if saved else 2 * self.every)
        return Instant(where, min(after, self.config.steps - 1), self.draw.uniform(0.0, JITTER_S[where]), how)

    def _judge(self, folder: Path, statuses: list[int | None], instant: Instant) -> None:
        name = f"{instant.where} {signal.Signals(instant.signal).name}"
        self.outcome.ends[name] = self.outcome.ends.get(name, 0) + 1
        if instant.signal == signal.SIGTERM:
            expected = [Stopped.status] * self.hosts
        else:
            expected = [peers.LOST] * (self.hosts - 1) + [-signal.SIGKILL]
        # While hosts begin, the one that is left may find nobody to join.
        if statuses != expected and not (instant.where == "start" and statuses[-1] == expected[-1] and all(statuses)):
            self.outcome.failures.append(f"{folder}: ended with {statuses}, not {expected}, after {instant}")

    def _count_lost(self, folder: Path, lost: int, instant: Instant) -> None:
        """A kill costs at most the steps since the last checkpoint, and those while the next one is written."""
        self.outcome.most_lost = max(self.outcome.most_lost, lost)
        most = 0 if instant.signal == signal.SIGTERM else 2 * self.every
        if lost > most:
            self.outcome.failures.append(f"{folder}: {lost} steps were lost, not at most {most}, by {instant}")


def damage(where: float, folder: Path, step: int) -> str | None:
    """Flips a bit of one file of a checkpoint; the file. None in a bucket, whose own checksums tell."""
    if is_bucket(folder):
        return None
    draw, saved = random.Random(where), folder / "checkpoints" / str(step)
    files = sorted(read_json(saved / "manifest.json")["files"])
    name = draw.choice([name for name in files if (saved / name).stat().st_size])
    data = bytearray((saved / name).read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (saved / name).write_bytes(bytes(data))
    return name
