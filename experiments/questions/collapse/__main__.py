"""Runs that are sick on purpose: trains those that are not trained yet, and draws every symptom beside a healthy run.

    python -m experiments.questions.collapse --workdir DIR --out DIR [--symptoms entropy,resume]

The runs are those of configs/studies/collapse.py, each in WORKDIR/NAME. For the symptom "resume" the healthy run is cut
after half of its steps: `resumed` goes on from its checkpoint, `restarted` begins anew from the policy that was
exported there, without the optimizer's state. Writes OUT/SYMPTOM.png, and the numbers as OUT/collapse.json and .md.
"""

from collections.abc import Collection, Sequence

from ml_collections import ConfigDict

from configs.studies.collapse import HEALTHY, SYMPTOMS, get_config
from dppo_jax.errors import lookup, run_main
from dppo_jax.files import Path
from experiments import sweep
from experiments.questions.collapse.report import RESTARTED, RESUMED, of_symptom, read, report
from experiments.run import cli
from experiments.sweep import Run
from experiments.train import train as train_one

HALF = get_config().steps // 2


def runs_of(config: ConfigDict, seeds: Sequence[int]) -> list[Run]:
    return [Run(config.loss.name, seed, 1.0) for seed in seeds]


def train(workdir: Path, symptoms: Collection[str], seeds: Sequence[int]) -> None:
    """The healthy run and those of the symptoms, from where each stopped. UserError before any is trained."""
    names = dict.fromkeys((HEALTHY, *(name for symptom in symptoms for name in of_symptom(symptom))))
    configs = {name: get_config(name) for name in names if name not in (RESUMED, RESTARTED)}
    for config in configs.values():
        sweep.check(config, runs_of(config, seeds))
    for name, config in configs.items():
        sweep.train(config, runs_of(config, seeds), workdir / name)
    if "resume" in symptoms:
        train_in_halves(workdir, seeds)


def train_in_halves(workdir: Path, seeds: Sequence[int]) -> None:
    """The healthy run up to HALF, what starts anew from its policy, and then the rest of it."""
    half, rest = get_config(), get_config()
    half.steps, half.checkpoint.export = HALF, True
    runs = runs_of(half, seeds)
    begun = workdir / RESTARTED / runs[-1].folder / "config.json"
    if not begun.exists():
        sweep.train(half, runs, workdir / RESUMED)
    rest.steps = HALF
    for run in runs:
        rest.policy.path = str(workdir / RESUMED / run.folder / "policy")
        train_one(sweep.config_of(rest, run), workdir / RESTARTED / run.folder)
    sweep.train(get_config(), runs, workdir / RESUMED)


def main() -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="a folder for each run; resumes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where figures and numbers go")
    parser.add_argument("--seeds", type=cli.SEEDS, default=3, metavar="N", help="seeds from 0 on (3)")
    parser.add_argument(
        "--symptoms", type=cli.by_commas(), default=tuple(SYMPTOMS), metavar="NAMES", help=f"of {', '.join(SYMPTOMS)}"
    )
    arguments = parser.parse_args()
    for symptom in arguments.symptoms:
        lookup(SYMPTOMS, symptom, "symptom")
    seeds = range(arguments.seeds)
    train(arguments.workdir, arguments.symptoms, seeds)
    print(report(read(arguments.workdir, arguments.symptoms, seeds), arguments.out), end="")


if __name__ == "__main__":
    run_main(main)
