"""Several kinds at once, each in a process of its own, with cores and a log of its own."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from ml_collections import ConfigDict

from dppo_jax.errors import run_main
from dppo_jax.files import Path
from experiments.chaos.faults import Fault, disturb
from experiments.chaos.processes import fork
from experiments.chaos.trials import Outcome, Trial

SLOWEST = ("two_hosts", "bucket", "in_flight")  # these begin first: the last to begin is waited for


@dataclass
class Part:
    """What is done to a kind."""

    kind: str
    config: ConfigDict
    folder: Path
    seed: int
    kills: int
    faults: list[str]


@dataclass
class Done:
    """What came of it."""

    outcome: Outcome
    faults: list[Fault] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [*self.outcome.failures, *(f"{one.name}: {what}" for one in self.faults for what in one.failures)]


def run_parts(parts: list[Part], workdir: str, jobs: int) -> Iterator[Done]:
    """Each part when it is done, in WORKDIR/KIND.log what its runs said. So many run at once."""
    left = sorted(parts, key=lambda part: SLOWEST.index(part.kind) if part.kind in SLOWEST else len(SLOWEST))
    cores = _shares(min(jobs, len(left)))
    running: dict[int, tuple[Part, list[int]]] = {}
    while left or running:
        while left and cores:
            part, own = left.pop(0), cores.pop()  # the slowest part has the largest share
            running[fork(partial(run_main, partial(_work, part, workdir, own)))] = part, own
        process, status = os.wait()
        if process not in running:
            continue
        part, own = running.pop(process)
        cores.append(own)
        yield _read(part, workdir, os.waitstatus_to_exitcode(status))


def _shares(jobs: int) -> list[list[int]]:
    """The cores of each job, the last's and what is over. Where that is less than two each, all have all."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // jobs
    if each < 2:
        return [cores] * jobs
    return [*(cores[number * each : (number + 1) * each] for number in range(jobs - 1)), cores[(jobs - 1) * each :]]


def _work(part: Part, workdir: str, cores: list[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
    trial = Trial(part.kind, part.config, part.folder, part.seed, os.path.join(workdir, f"{part.kind}.log"))
    _say(f"{part.kind}: {part.kills} kills{''.join(f', {name}' for name in part.faults)}")
    trial.begin()
    trial.kill(part.kills)
    _save(Done(trial.outcome), part, workdir)
    done = Done(trial.outcome)
    for name in part.faults:
        done.faults.append(disturb(trial, name))
        _save(done, part, workdir)
    _say(f"{part.kind}: {len(done.failures) or 'no'} failures")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _save(done: Done, part: Part, workdir: str) -> None:
    with open(os.path.join(workdir, f"{part.kind}.json"), "w") as file:
        json.dump(dataclasses.asdict(done), file)


def _read(part: Part, workdir: str, status: int) -> Done:
    done = Done(Outcome(part.kind))
    with contextlib.suppress(FileNotFoundError), open(os.path.join(workdir, f"{part.kind}.json")) as file:
        values = json.load(file)
        done = Done(Outcome(**values["outcome"]), [Fault(**one) for one in values["faults"]])
    if status:
        done.outcome.failures.append(f"this part ended with {status}, and was not done")
    return done
