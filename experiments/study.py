"""A question put to several losses: the same prompts and keys for all, several seeds, and what they show.

Each question has a folder with its arms:

    python -m experiments.questions.necessity --config configs/reuse.py --workdir runs/study --out DIR

Every arm is trained by `experiments.sweep` in WORKDIR/ARM, or, with --separate, run by run by `experiments.train`, for
models that fill the machine. Finished runs stay, and questions that share a workdir share their arms. Then DIR gets a
table (.md), its numbers (.json) and the curves (.png).
"""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs.methods import METHODS, loss_of
from dppo_jax.errors import UserError, lookup, nearest
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.storage.run_log import Scalars, read_scalars
from experiments import sweep
from experiments.plot import Curve, bootstrap_interval, draw, save
from experiments.run import checks, cli
from experiments.sweep import OF_METHODS, Run, config_of
from experiments.train import train as train_one

LAST = 10  # steps at a run's end whose mean reward is its outcome
FIRST = "mismatch/abs_prob_diff_mean"  # over a rollout's first minibatch; another tag where parameters were not equal
TAGS = ("reward/mean", FIRST, "policy/abs_prob_diff_mean", "trust_region/masked")
AGE = "rollout/age_mean"  # in the table where an arm has settings
SMOOTH = 5
FIRST_ARM, OWN = "minus the first", "minus its loss's first"  # what an outcome is compared with
THRESHOLDS = ("delta", "eps")  # hyperparameters that begin so are scaled by Arm.scale


class Arm(NamedTuple):
    """A loss with its loss_defaults, but for thresholds `scale` times as wide and the `numbers` given; `settings` are
    other keys of the config, by dotted name. With a `method`, whose loss it is, all that the method sets: `Arm.of`."""

    loss: str
    scale: float = 1.0
    numbers: tuple[tuple[str, float], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    method: str | None = None

    @classmethod
    def of(cls, method: str, settings: tuple[tuple[str, Any], ...] = ()) -> "Arm":
        """A method of configs/methods.py. UserError for an unknown name, and for a setting that methods have for
        themselves."""
        for key, _ in settings:
            if key in OF_METHODS or key.startswith("loss") or key in lookup(METHODS, method, "method").sets:
                raise UserError(f"an arm sets {key}, which method {method!r} has for itself; take an arm of its loss")
        return cls(loss_of(method), settings=settings, method=method)

    @property
    def name(self) -> str:
        """Of its folder and curve."""
        scaled = [] if self.scale == 1 else [f"x{self.scale:g}"]
        numbers = [f"{key}{value:g}" for key, value in self.numbers]
        settings = [f"{key.rpartition('.')[2]}{value}" for key, value in self.settings]
        return "_".join([self.method or self.loss, *scaled, *numbers, *settings])

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """One of every seed."""
        return [Run(self.loss, seed, 1.0, self.method) for seed in seeds]

    def config(self, config: ConfigDict) -> ConfigDict:
        """The config whose defaults for this loss are the arm's."""
        arm_config = config.copy_and_resolve_references()
        numbers = arm_config.loss_defaults[self.loss].to_dict() if self.loss in arm_config.loss_defaults else {}
        scaled = {key: value * self.scale for key, value in numbers.items() if key.startswith(THRESHOLDS)}
        if self.scale != 1 and numbers and not scaled:
            raise UserError(f"loss {self.loss!r} has no threshold to scale: none begins with {' or '.join(THRESHOLDS)}")
        with arm_config.unlocked():
            arm_config.loss_defaults[self.loss] = {**numbers, **scaled, **dict(self.numbers)}
        arm_config.update_from_flattened_dict(dict(self.settings))
        return arm_config


def train(config: ConfigDict, arms: Sequence[Arm], workdir: Path, seeds: Sequence[int], *, separate: bool) -> None:
    """Trains what is not trained yet, once all arms are checked."""
    for arm in arms:
        arm_config, runs = arm.config(config), arm.runs(seeds)
        if separate:
            sweep.check_own(arm_config, runs)
            checks.check(config_of(arm_config, runs[0]))
        else:
            sweep.check(arm_config, runs)
    for arm in arms:
        arm_config, runs = arm.config(config), arm.runs(seeds)
        if separate:
            for run in runs:
                train_one(config_of(arm_config, run), workdir / arm.name / run.folder)
            continue
        sweep.train(arm_config, runs, workdir / arm.name)


def read(workdir: Path, arm: Arm, seeds: Sequence[int]) -> list[Scalars]:
    """The arm's runs, by seed."""
    return [read_scalars(workdir / arm.name / run.folder) for run in arm.runs(seeds)]


def outcome(run: Scalars) -> float:
    """Mean reward of the last steps."""
    return float(np.mean(run["reward/mean"][1][-LAST:]))


def by_step(run: Scalars, tag: str) -> np.ndarray:
    """Its values; of FIRST, those too of steps whose rollout was drawn by older parameters."""
    tags = (tag, tag.replace("mismatch/", "first_minibatch/"))
    values = {step: value for name in tags if name in run for step, value in zip(*run[name], strict=True)}
    return np.array([values[step] for step in sorted(values)])


def mean_and_interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high], 95% bootstrap over seeds."""
    low, high = bootstrap_interval(np.asarray(values))
    return [round(float(x), 5) for x in (np.mean(values), low, high)]


def summary(runs: dict[str, list[Scalars]], against: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """By arm. `collapsed` counts seeds that end below the mean reward that all arms begin with.

    Differences are from the first arm; those of the arms in `against`, from the one named there.
    """
    start = float(np.mean([run["reward/mean"][1][0] for runs_of_arm in runs.values() for run in runs_of_arm]))
    first, arms = next(iter(runs)), {}
    for name, runs_of_arm in runs.items():
        ends = [outcome(run) for run in runs_of_arm]
        others = [outcome(run) for run in runs[against.get(name, name if against else first)]]
        ages = [float(np.mean(run[AGE][1])) for run in runs_of_arm if AGE in run]
        arms[name] = {
            "by seed": [round(end, 4) for end in ends],
            "outcome": mean_and_interval(ends),
            OWN if against else FIRST_ARM: mean_and_interval(np.subtract(ends, others).tolist()),
            "whole run": mean_and_interval([float(np.mean(run["reward/mean"][1])) for run in runs_of_arm]),
            "collapsed": sum(end < start for end in ends),
            **{tag: mean_and_interval([float(np.mean(by_step(run, tag))) for run in runs_of_arm]) for tag in TAGS[1:]},
            **({"age": mean_and_interval(ages)} if against else {}),
        }
    steps = len(runs_of_arm[0]["reward/mean"][1])
    return {"start": round(start, 4), "seeds": len(runs_of_arm), "steps": steps, "arms": arms}


def markdown(result: dict[str, Any]) -> str:
    """The summary as a table."""

    def cell(values: list[float], digits: int = 2) -> str:
        mean, low, high = (f"{x:.{digits}f}" for x in values)
        return f"{mean} [{low}, {high}]"

    difference = OWN if OWN in next(iter(result["arms"].values())) else FIRST_ARM
    with_age = difference == OWN
    lines = [
        f"{result['seeds']} seeds, {result['steps']} steps, mean reward {result['start']:.3f} at the first. "
        f"Outcome: mean reward of the last {LAST} steps; in brackets its 95% bootstrap interval over seeds; "
        "differences are paired by seed; collapsed: seeds that end below the start; |π − μ|: its mean, at rollout → "
        "over all updates.",
        "",
        f"| arm | outcome | {difference} arm | whole run | collapsed | masked | \\|π − μ\\| |" + " age |" * with_age,
        "|---|---|---|---|---|---|---|" + "---|" * with_age,
    ]
    for name, arm in result["arms"].items():
        mismatch, shift, masked = (arm[tag][0] for tag in TAGS[1:])
        lines.append(
            f"| `{name}` | {cell(arm['outcome'])} | {cell(arm[difference])} | {cell(arm['whole run'])} "
            f"| {arm['collapsed']} of {result['seeds']} | {100 * masked:.2f}% | {mismatch:.1e} → {shift:.1e} |"
            + (f" {arm['age'][0]:.2f} |" if with_age else "")
        )
    return "\n".join(lines) + "\n"


def main(description: str, arms: Sequence[Arm]) -> None:
    """The command line of a question."""
    config, arguments = cli.parse(
        description.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each arm; resumes"),
            "--out": dict(type=Path, required=True, metavar="F", help="writes F.md, F.json and F.png"),
            "--seeds": dict(type=cli.SEEDS, default=3, metavar="N", help="seeds from config.seed on (3)"),
            "--arms": dict(
                type=cli.by_commas(), metavar="NAMES", help=f"some of {', '.join(arm.name for arm in arms)}, by commas"
            ),
            "--separate": dict(action="store_true", help="one run after another, by experiments.train"),
        },
    )
    by_name = {arm.name: arm for arm in arms}
    chosen = arguments.arms or list(by_name)
    for name in chosen:
        if name not in by_name:
            raise UserError(f"--arms has {name!r:.80}{nearest(name[:80], by_name)}")
    plain = {name: by_name[name]._replace(settings=()).name for name in chosen if by_name[name].settings}
    if missing := sorted({*plain.values()} - {*chosen}):
        raise UserError(f"--arms needs {missing[0]}, with which the others of its loss are compared")
    seeds = range(config.seed, config.seed + arguments.seeds)
    train(config, [by_name[name] for name in chosen], arguments.workdir, seeds, separate=arguments.separate)
    runs = {name: read(arguments.workdir, by_name[name], seeds) for name in chosen}
    result = summary(runs, plain)
    make_folder(arguments.out.parent)
    text = markdown(result)
    write_text(arguments.out.with_suffix(".md"), text)
    write_text(arguments.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    figure = draw([Curve(name, runs_of_arm) for name, runs_of_arm in runs.items()], SMOOTH, TAGS)
    save(figure, arguments.out.with_suffix(".png"))
    print(text, end="")


if __name__ == "__main__":
    raise SystemExit("error: experiments.study is no command; the questions in experiments/questions use it")
