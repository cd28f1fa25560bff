"""Trains losses or methods × seeds at once: one compiled step for all runs, mapped over both.

    python -m experiments.sweep --config configs/reuse.py --workdir DIR --losses pg_is,kpop --config.eval.every=0
    python -m experiments.sweep --config configs/reuse.py --workdir DIR --methods gspo,dapo,dppo_binary_tv

For models so small that one run leaves the machine idle. Every run has a folder DIR/NAME/seed_N of its own with
TensorBoard logs and HParams: the same prompts, keys and numbers as of experiments.train, up to float rounding. Started
again with the same runs, it goes on from its last checkpoint. A loss has its loss_defaults, and the config's own loss
what loss.<name> sets beside; anything else, such as the advantages and the aggregation, is the config's. A method has
all that configs/methods.py sets; model, data and sizes are the config's. --rates scales optimizer.learning_rate, and
names the runs NAME_xRATE.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import quickstart
from configs.methods import METHODS, loss_of, set_method
from dppo_jax.errors import UserError, lookup, run_main
from dppo_jax.files import Path
from dppo_jax.losses import LOSSES, hyperparameters
from experiments.run import checks, cli, ranges
from experiments.run.check_data import value
from experiments.run.evaluation import Evaluation
from experiments.run.export import export
from experiments.run.learner import Learner
from experiments.run.load import load_prompts, load_setup
from experiments.run.pins import pinned
from experiments.run.record import Record
from experiments.run.reward_model import load_reward_model
from experiments.run.run_folder import run_folder
from experiments.run.runs import Runs
from experiments.run.sampler import Sampler
from experiments.train import loop

# What is not trained side by side, and why.
ALONE = {
    "advantage.name = gae": "critics are not trained side by side",
    "alp.sigma": "its noise is drawn from one seed, a constant of the compiled update",
    "lora.rank": "adapters are not trained side by side",
}
# What each method of a sweep has for itself, beside its loss; all other keys are the same for all runs.
OF_METHODS = (
    "advantage.name", "advantage.drop_equal", "aggregation.name", "aggregation.constant", "reference.coef",
    "reference.estimator", "reward.overlong_buffer", "reward.overlong_filter", "rollout.resample",
)  # fmt: skip


class Run(NamedTuple):
    """One of the runs: of a loss with the config's other settings or, with a `method`, of that with its own."""

    loss: str
    seed: int
    rate: float
    method: str | None = None  # whose loss it is

    @property
    def name(self) -> str:
        """Of the loss, or of the method."""
        return self.loss if self.method is None else self.method

    @property
    def folder(self) -> str:
        scaled = "" if self.rate == 1 else f"_x{self.rate:g}"
        return f"{self.name}{scaled}/seed_{self.seed}"


def make_runs(losses: Sequence[str], methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Run]:
    """Losses, then methods, each at every rate, with every seed. UserError for an unknown name, and for one that would
    not say whether it is a loss or a method."""
    for name in losses:
        lookup(LOSSES, name, "loss")
    for name in (*losses, *methods) if losses and methods else ():
        if name in LOSSES and name in METHODS:
            raise UserError(
                f"{name!r} is a loss and a method, and a sweep of both would not say which: give --losses and "
                "--methods a --workdir each"
            )
    pairs = [*((name, None) for name in losses), *((loss_of(name), name) for name in methods)]
    return [Run(loss, seed, rate, method) for loss, method in pairs for rate in rates for seed in seeds]


def config_of(config: ConfigDict, run: Run) -> ConfigDict:
    """The config that experiments.train would take."""
    own = config.copy_and_resolve_references()
    own.loss.name, own.seed = run.loss, run.seed
    if run.method is not None or run.loss != config.loss.name:  # loss.<number> is of the config's own loss
        own.loss.update({key: None for key in own.loss if key != "name"})
    if run.method is not None:
        set_method(own, run.method)
    own.optimizer.learning_rate = own.optimizer.learning_rate * run.rate
    return own


def check(config: ConfigDict, runs: list[Run]) -> None:
    """Refuses what a sweep cannot batch. UserError, one sentence."""
    check_own(config, runs)
    for key in _alone(config):
        raise UserError(f"a sweep does without {key}: {ALONE[key]}; leave it at its default, or use experiments.train")
    _check_methods(config, list(dict.fromkeys(run.method for run in runs if run.method is not None)))
    whole: set[tuple[str, str | None]] = set()
    for run in runs:
        lookup(LOSSES, run.loss, "loss")
        one = run.loss, run.method
        try:
            (ranges.check_values if one in whole else checks.check)(config_of(config, run))
        except UserError as error:
            raise error if run.method is None else UserError(f"method {run.method!r}: {error}") from None
        whole.add(one)  # seeds and rates are only numbers
    folders = [run.folder for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"two runs of the sweep would share the folder {twice[0]!r}: their rates are too close")


def check_own(config: ConfigDict, runs: Sequence[Run]) -> None:
    """UserError where the config sets what no run would take from it: numbers of a loss that is not among them, and
    what methods have for themselves."""
    numbers = [key for key, number in config.loss.items() if key != "name" and number is not None]
    if numbers and config.loss.name not in {run.loss for run in runs if run.method is None}:
        taking = [run.loss for run in runs if numbers[0] in hyperparameters(LOSSES[run.loss]) - _own_numbers(run)]
        rather = f"set loss_defaults.{taking[0]}.{numbers[0]}, and " if taking else ""
        raise UserError(
            f"loss.{numbers[0]} is set, of {config.loss.name}, which is not among the losses of this sweep; "
            f"{rather}leave it out, or unset it: loss.{numbers[0]}=None"
        )
    if all(run.method is None for run in runs):
        return
    plain = quickstart.get_config()
    for run in runs:
        usual = plain.loss_defaults.get(run.loss, {})
        for key, number in config.loss_defaults.get(run.loss, {}).items():
            if key in _own_numbers(run) and number is not None and number != usual.get(key):
                raise UserError(
                    f"loss_defaults.{run.loss}.{key} = {number:g} reaches no run: method {run.method!r} sets loss.{key}"
                    f" itself; give --losses, or train the method alone with --config.loss.{key}={number:g}"
                )
    for key in sorted({key for method in METHODS.values() for key in method.sets}.intersection(OF_METHODS)):
        if value(config, key) != value(plain, key):
            raise UserError(
                f"{key} = {ranges.shown(value(config, key))} is the config's, and methods have their own: set {key}="
                f"{value(plain, key)}, or give --losses"
            )


def _own_numbers(run: Run) -> set[str]:
    """Hyperparameters of its loss that a run's method sets itself."""
    return {key.removeprefix("loss.") for key in METHODS[run.method].sets} if run.method else set()


def _alone(config: ConfigDict) -> list[str]:
    """What a config has of ALONE."""
    used = {
        "advantage.name = gae": config.advantage.name == "gae",
        "alp.sigma": config.alp.sigma,
        "lora.rank": config.lora.rank,
    }
    return [key for key in ALONE if used[key]]


def _check_methods(config: ConfigDict, names: Sequence[str]) -> None:
    """UserError for a method that does not fit beside others."""
    obstacles = {name: _obstacle(config, name) for name in names}
    fitting = [name for name in names if not obstacles[name]]
    for name, obstacle in obstacles.items():
        if obstacle:
            beside = f"; of those given, a sweep can have {', '.join(fitting)}" if fitting else ""
            raise UserError(
                f"method {name!r} sets {obstacle}run it alone: python -m experiments.train --config "
                f"configs/methods.py:{name}{beside}"
            )


def _obstacle(config: ConfigDict, name: str) -> str:
    """What a method sets that keeps it out of a sweep, why, and what helps beside leaving it out; "": nothing."""
    own = config_of(config, Run(loss_of(name), config.seed, 1.0, name))
    for key in _alone(own):
        return f"{key}, and {ALONE[key]}: "
    for key in METHODS[name].sets:
        wanted, shared = value(own, key), value(config, key)
        if wanted != shared and key not in OF_METHODS and not key.startswith("loss."):
            return (
                f"{key} = {ranges.shown(wanted)}, and the runs of a sweep share theirs, {ranges.shown(shared)}: set "
                f"{key}={wanted} for all, or "
            )
    return ""


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
            seeded = dataclasses.replace(lead, config=config_of(config, runs[0]._replace(seed=seed, rate=1.0)))
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
            with record.hearing_signals(sampler, learner):
                loop(together, sampler, learner, record, evaluation)
                if config.checkpoint.export:
                    for number, (folder, setup) in enumerate(zip(folders, setups, strict=True)):
                        export(setup, together.alone(learner.params, number), {}, folder.path)
        else:
            print(f"nothing to do: {workdir} has {record.start} of {config.steps} steps")
    print(f"logs: {workdir}")


# Options that name what is trained.
NAMED = {
    "--losses": dict(
        type=cli.by_commas(), default=(), metavar="NAMES", help="losses, by commas, with the config's other settings"
    ),
    "--methods": dict(
        type=cli.by_commas(), default=(), metavar="NAMES", help="whole methods of configs/methods.py, by commas"
    ),
}


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each run; resumes"),
            **NAMED,
            "--seeds": dict(type=cli.SEEDS, default=3, metavar="N", help="seeds from config.seed on (3)"),
            "--over": dict(default="auto", metavar="HOW", help="vmap: runs at once | map: in turns | auto"),
            "--rates": dict(
                type=cli.by_commas(cli.positive), default="1", metavar="NUMBERS", help="times the learning rate (1)"
            ),
        },
    )
    if not (arguments.losses or arguments.methods):
        raise UserError("--losses or --methods is required: names by commas")
    seeds = range(config.seed, config.seed + arguments.seeds)
    runs = make_runs(arguments.losses, arguments.methods, arguments.rates, seeds)
    train(config, runs, arguments.workdir, over=arguments.over)


if __name__ == "__main__":
    run_main(main)
