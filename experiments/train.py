"""Trains a policy by reinforcement learning.

    python -m experiments.train --config configs/quickstart.py --workdir runs/quickstart [--config.loss.name=cispo]

One step: the behavior policy answers every prompt G times; the host scores the replies; rewards become advantages
within each group; the policy takes one optimizer step per minibatch, each token weighed and masked by the loss.
With train.staleness = 1 the next batch is drawn before the updates, while the host scores this one.
A run is a function of (config, seed, data): started again in the same workdir, it goes on from its last checkpoint
as if it had never stopped. On several hosts (docs/pods.md) each prepares and scores the rows that its devices hold.
"""

import contextlib
import dataclasses

from ml_collections import ConfigDict

from dppo_jax.devices import hosts, peers
from dppo_jax.errors import UserError
from dppo_jax.files import Path
from dppo_jax.storage.run_log import summary_table
from experiments.run import cli
from experiments.run.critic import privileged
from experiments.run.evaluation import Evaluation
from experiments.run.export import export
from experiments.run.identity import same_config_everywhere
from experiments.run.learner import Learner
from experiments.run.load import load_prompts, load_setup
from experiments.run.record import Record
from experiments.run.reward_model import load_reward_model
from experiments.run.run_folder import run_folder
from experiments.run.runs import Runs
from experiments.run.sampler import Sampler
from experiments.trace import trace


def loop(runs: Runs, sampler: Sampler, learner: Learner, record: Record, evaluation: Evaluation) -> None:
    """Every step that is left to do, of one run or of several together."""
    steps, phase = runs.base.config.steps, record.phases
    for step in range(record.start, steps):
        record.begin(step)
        with phase("evaluation"):
            scores = evaluation.at(step, learner)
        with phase("rollout"):
            sampler.start(step)  # prompts -> rollout, on the devices; nothing where it was drawn early
            record.write()  # the last step's log, meanwhile
            samples = sampler.collect(step)  # waits for the rollout; its replies go to the verifiers
        with phase("train"):
            batch = learner.assemble(samples)  # with the other policies' log-probabilities
        with phase("reward"):
            replies = sampler.rewards(samples)  # verified and shaped
        with phase("train"):
            batch = learner.advantages(batch, replies)
            plans, metrics = [], []
            for plan in learner.minibatches(step, replies):  # made on the host, during the update before
                record.look(step, learner)  # waits for that one: if it was skipped, its parameters are still there
                plans.append(plan)
                metrics.append(learner.update(batch, plan, samples.drawing.params))
                sampler.publish(learner.params, learner.frozen)
            record.look(step, learner)
        record.step(step, samples, plans, metrics, scores)
        record.save_if_due(step + 1, sampler, learner)
    record.finish(evaluation.at(steps, learner))


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes a run. UserError, one sentence, for whatever the user can mend."""
    with contextlib.ExitStack() as stack:
        same_config_everywhere(config)
        setup = load_setup(config, stack, begun=workdir)
        config = setup.config
        stream, scorer = load_prompts(setup, config.data, config.rollout.prompts, stack, critic=privileged(config))
        reward_model = load_reward_model(setup, stream.examples, stack)
        beside = reward_model.device_bytes if reward_model else 0
        setup = dataclasses.replace(setup, mean_prompt=stream.mean_prompt_length, beside_bytes=beside)
        runs = Runs([setup])
        evaluation = Evaluation(runs, stack)
        folder = run_folder(workdir, setup, stream, evaluation)
        sampler, learner = Sampler(runs, [stream], scorer, reward_model), Learner(runs)
        stack.callback(sampler.close)
        record = stack.enter_context(Record(runs, workdir, [folder]))
        record.resume(sampler, learner)
        if record.unfinished:
            with record.hearing_signals(sampler, learner):
                loop(runs, sampler, learner, record, evaluation)
                if config.checkpoint.export:
                    export(setup, learner.params, learner.frozen, workdir)
        elif hosts.is_writer():
            print(f"nothing to do: {workdir} has {record.start} of {config.steps} steps")
    if hosts.is_writer():
        print(summary_table(workdir))


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, metavar="DIR", help="logs and checkpoints; resumes what is there"),
            "--trace": dict(action="store_true", help="check the config and trace its shapes, without weights or data"),
            **peers.FLAGS,
        },
        first=peers.join,
    )
    if arguments.trace:
        print(trace(config))
    elif arguments.workdir is None:
        raise UserError("--workdir DIR is required, for logs and checkpoints")
    else:
        train(config, arguments.workdir)


if __name__ == "__main__":
    peers.run_main(main)
