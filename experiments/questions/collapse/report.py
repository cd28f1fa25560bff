"""What the sick runs show: a figure for each symptom, and a table of first and last steps."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from configs.studies.collapse import HEALTHY, SICK, SYMPTOMS, get_config
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.storage.run_log import MACHINE, Scalars, read_scalars
from experiments.plot import Curve, draw, save
from experiments.sweep import Run

RESUMED, RESTARTED = "resumed", "restarted"
REWARD = "reward/mean"
MEAN_OF = 5  # steps at a run's beginning, and at its end
DPI = 80  # figures stay below 60 kB


def of_symptom(symptom: str) -> tuple[str, ...]:
    """The names of its runs, the healthy one first."""
    if symptom == "resume":
        return HEALTHY, RESUMED, RESTARTED
    return HEALTHY, *(name for name, sick in SICK.items() if symptom in sick.symptoms)


def read(workdir: Path, symptoms: Collection[str], seeds: Sequence[int]) -> dict[str, list[Scalars]]:
    """By name, each run's seeds. Steps of `restarted` count from the beginning of the run whose policy it took."""
    names = dict.fromkeys(name for symptom in symptoms for name in of_symptom(symptom))
    found = {}
    for name in names:
        loss = get_config(name if name in SICK else HEALTHY).loss.name
        found[name] = [read_scalars(workdir / name / Run(loss, seed, 1.0).folder) for seed in seeds]
    if RESTARTED in found:
        found[RESTARTED] = [after(run, get_config().steps // 2) for run in found[RESTARTED]]
    return found


def after(run: Scalars, steps: int) -> Scalars:
    """The run as one that began so many steps later."""
    return {tag: (numbers + steps, values) for tag, (numbers, values) in run.items()}


def differing(one: Scalars, other: Scalars) -> list[str]:
    """The tags, the machine's aside, of which two runs logged other steps or other bits."""
    tags = {tag for tag in {*one, *other} if not tag.startswith(MACHINE)}
    return sorted(
        tag for tag in tags
        if tag not in one or tag not in other or not all(map(np.array_equal, one[tag], other[tag]))
    )  # fmt: skip


def ends(runs: Sequence[Scalars], tag: str) -> dict[str, list[float]]:
    """Means over the first and the last steps, by seed."""
    values = [run[tag][1] for run in runs]
    return {
        "first": [float(f"{np.mean(of_run[:MEAN_OF]):.4g}") for of_run in values],
        "last": [float(f"{np.mean(of_run[-MEAN_OF:]):.4g}") for of_run in values],
    }


def summary(runs: Mapping[str, list[Scalars]]) -> dict[str, Any]:
    """By symptom and run: what was done, and by tag its first and last steps. For resume, the tags that differ."""
    done = {name: sick.done for name, sick in SICK.items()} | {
        HEALTHY: "nothing",
        RESUMED: "stopped at half of its steps, and gone on with from its checkpoint",
        RESTARTED: "begun anew from the policy exported there, without the optimizer's state",
    }
    found: dict[str, Any] = {}
    for symptom, tags in SYMPTOMS.items():
        names = of_symptom(symptom)
        if all(name in runs for name in names):
            found[symptom] = {
                name: {"done": done[name], **{tag: ends(runs[name], tag) for tag in (*tags, REWARD)}} for name in names
            }
    if RESUMED in runs:
        pairs = zip(runs[HEALTHY], runs[RESUMED], strict=True)
        found["resume"][RESUMED]["tags that differ"] = [differing(*pair) for pair in pairs]
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The summary as a table: means over seeds."""

    def cell(values: Mapping[str, list[float]]) -> str:
        return " → ".join(f"{np.mean(values[when]):.3g}" for when in ("first", "last"))

    lines = [f"Means over seeds and over {MEAN_OF} steps: the first → the last.", ""]
    lines += ["| symptom | run | what was done | its tags | reward |", "|---|---|---|---|---|"]
    for symptom, runs in found.items():
        for name, values in runs.items():
            shown = ", ".join(f"`{tag}` {cell(values[tag])}" for tag in SYMPTOMS[symptom])
            lines.append(f"| {symptom} | `{name}` | {values['done']} | {shown} | {cell(values[REWARD])} |")
    return "\n".join(lines) + "\n"


def report(runs: Mapping[str, list[Scalars]], out: Path) -> str:
    """Writes the figures, collapse.json and collapse.md; returns the table."""
    make_folder(out)
    found = summary(runs)
    for symptom in found:
        curves = [Curve(name, runs[name]) for name in of_symptom(symptom)]
        save(draw(curves, tags=(*SYMPTOMS[symptom], REWARD)), out / f"{symptom}.png", dpi=DPI)
    text = markdown(found)
    write_text(out / "collapse.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "collapse.md", text)
    return text
