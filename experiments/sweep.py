"""Trains losses × seeds at once: one compiled step for all runs, mapped over both.

    python -m experiments.sweep --config configs/reuse.py --workdir DIR --losses pg_is,kpop --config.eval.every=0

For models so small that one run leaves the machine idle. Every run has a folder DIR/LOSS/seed_N of its own with
TensorBoard logs and HParams: the same prompts, keys and numbers as of experiments.train, up to float rounding. Started
again with the same runs, it goes on from its last checkpoint. A loss has its loss_defaults, and the config's own loss
what loss.<name> sets beside; anything else, such as the advantages and the aggregation, is the config's. --rates scales
optimizer.learning_rate, and names the runs LOSS_xRATE.
"""

import contextlib
import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from dppo_jax.devices import peers
from dppo_jax.errors import UserError, lookup, run_main
from dppo_jax.files import Path
from dppo_jax.losses import LOSSES
from experiments.run import checks, cli, ranges
from experiments.run.evaluation import Evaluation
from experiments.run.export import export
from experiments.run.learner import Learner
from experiments.run.load import load_prompts, load_setup
from experiments.run.pins import pinned
from experiments.run.record import Record, run_folder
from experiments.run.reward_model import load_reward_model
from experiments.run.runs import Runs
from experiments.run.sampler import Sampler
from experiments.train import loop


class Run(NamedTuple):
    """One of the runs."""

    loss: str
    seed: int
    rate: float

    @property
    def folder(self) -> str:
        scaled = "" if self.rate == 1 else f"_x{self.rate:g}"
        return f"{self.loss}{scaled}/seed_{self.seed}"


def config_of(config: ConfigDict, run: Run) -> ConfigDict:
    """The config that experiments.train would take."""
    own = config.copy_and_resolve_references()
    own.loss.name, own.seed = run.loss, run.seed
    if run.loss != config.loss.name:  # loss.<number> is of the config's own loss
        own.loss.update({key: None for key in own.loss if key != "name"})
    own.optimizer.learning_rate = config.optimizer.learning_rate * run.rate
    return own


def check(config: ConfigDict, runs: list[Run]) -> None:
    """Refuses what a sweep cannot batch. UserError, one sentence."""
    numbers = [key for key, value in config.loss.items() if key != "name" and value is not None]
    if numbers and config.loss.name not in {run.loss for run in runs}:
        raise UserError(
            f"loss.{numbers[0]} is set, of {config.loss.name}, which is not among the losses of this sweep; "
            f"set loss_defaults.{runs[0].loss}.{numbers[0]}"
        )
    whole: set[str] = set()
    for run in runs:
        lookup(LOSSES, run.loss, "loss")
        (ranges.check_values if run.loss in whole else checks.check)(config_of(config, run))
        whole.add(run.loss)  # seeds and rates are only numbers
    folders = [run.folder for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"two runs of the sweep would share the folder {twice[0]!r}: their rates are too close")
    refused = {
        "advantage.name = gae": (config.advantage.name == "gae", "critics are not trained side by side"),
        "alp.sigma": (config.alp.sigma, "its noise is drawn from one seed, a constant of the compiled update"),
        "lora.rank": (config.lora.rank, "adapters are not trained side by side"),
    }
    for key, (used, why) in refused.items():
        if used:
            raise UserError(f"a sweep does without {key}: {why}; leave it at its default, or use experiments.train")


def train(config: ConfigDict, runs: list[Run], workdir: Path, *, over: str = "auto") -> None:
    """Trains the runs from their last checkpoint to the end; a sweep that is finished stays as it is.

    `over`: vmap (runs at once), map (in turns) or auto.
    """
    check(config, runs)
    config = pinned(config, workdir / runs[0].folder)
    with contextlib.ExitStack() as stack:
        lead = load_setup(config_of(config, runs[0]), stack, on_mesh=False)
        streams = {}
        for seed in sorted({run.seed for run in runs}):  # one stream of prompts a seed, one scorer for all
            seeded = dataclasses.replace(lead, config=config_of(config, Run(runs[0].loss, seed, 1.0)))
            streams[seed], scorer = load_prompts(seeded, config.data, config.rollout.prompts, stack)
        mean = streams[runs[0].seed].mean_prompt_length
        reward_model = load_reward_model(lead, streams[runs[0].seed].examples, stack)
        setups = [dataclasses.replace(lead, config=config_of(config, run), mean_prompt=mean) for run in runs]
        # What is compiled is the lead's: each run's own rate is a factor of it.
        base = dataclasses.replace(lead, config=config_of(config, runs[0]._replace(rate=1.0)), mean_prompt=mean)
        together = Runs(setups, over, base=base)
        evaluation = Evaluation(together, stack)
        folders = [
            run_folder(workdir / run.folder, setup, streams[run.seed], evaluation)
            for run, setup in zip(runs, setups, strict=True)
        ]
        sampler = Sampler(together, [streams[run.seed] for run in runs], scorer, reward_model)
        learner = Learner(together, [run.rate for run in runs])
        record = stack.enter_context(Record(together, workdir, folders))
        record.resume(sampler, learner)
        if record.unfinished:
            with peers.hearing_sigterm():
                loop(together, sampler, learner, record, evaluation)
            if config.checkpoint.export:
                for number, (folder, setup) in enumerate(zip(folders, setups, strict=True)):
                    export(setup, together.alone(learner.params, number), {}, folder.path)
        else:
            print(f"nothing to do: {workdir} has {record.start} of {config.steps} steps")
    print(f"logs: {workdir}")


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each run; resumes"),
            "--losses": dict(type=cli.by_commas(), required=True, metavar="NAMES", help="losses, by commas"),
            "--seeds": dict(type=cli.SEEDS, default=3, metavar="N", help="seeds from config.seed on (3)"),
            "--over": dict(default="auto", metavar="HOW", help="vmap: runs at once | map: in turns | auto"),
            "--rates": dict(
                type=cli.by_commas(cli.positive), default="1", metavar="NUMBERS", help="times the learning rate (1)"
            ),
        },
    )
    runs = [
        Run(loss, seed, rate)
        for loss in arguments.losses
        for rate in arguments.rates
        for seed in range(config.seed, config.seed + arguments.seeds)
    ]
    train(config, runs, arguments.workdir, over=arguments.over)


if __name__ == "__main__":
    run_main(main)
