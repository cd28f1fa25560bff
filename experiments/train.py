"""Trains a policy by reinforcement learning.

    python -m experiments.train --config configs/quickstart.py --workdir runs/quickstart [--config.loss.name=cispo]

One step: the behavior policy answers every prompt G times; the host scores the answers; rewards become advantages
within each group; the policy takes one optimizer step per minibatch, each token weighed and masked by the loss.
A run is a function of (config, seed, data): started again in the same workdir, it goes on from its last checkpoint
as if it had never stopped.
"""

import contextlib
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dppo_jax import metrics as metrics_lib
from dppo_jax.checkpoint import Checkpoints, abstract_state
from dppo_jax.data.prompts import decode_replies
from dppo_jax.errors import UserError, run_main
from dppo_jax.losses import required_fields
from dppo_jax.models import save_hf
from dppo_jax.models.decoder import abstract_params
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.run_log import RunLog, summary_table, write_config
from dppo_jax.sampling import step_key
from dppo_jax.sharding import rows
from dppo_jax.train_step import assemble, init_state, jit_update, state_shardings, take_rows
from experiments import build, cli
from experiments.report import Report
from experiments.trace import trace


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes a run. UserError, one sentence, for whatever the user can mend."""
    build.check(config)
    with contextlib.ExitStack() as stack:
        # Mesh, policy, optimizer.
        directory = build.model_directory(config)
        model = load_config(directory)
        build.check_length(config, model)
        mesh = build.on_devices(config, stack)
        build.check_mesh(config, mesh, model)
        text = build.text(directory, model)
        optimizer = build.optimizer(config)
        learning_rate = build.schedule(config)
        shardings = state_shardings(model, optimizer, abstract_params(model), mesh)

        # Data and rewards.
        stream, scorer = build.stream_and_scorer(config, config.data, text.tokenizer, config.rollout.prompts, stack)
        evaluation = build.Evaluation(config, model, mesh, text, stack)

        # What runs on the devices, each compiled once.
        generate = build.on_mesh(build.rollout(config, model, text.eos_ids, text.pad_id), mesh)
        score = jax.jit(build.score(config, model, mesh), out_shardings=rows(mesh))
        update = jit_update(build.update(config, model, mesh), shardings, mesh)
        advantages = jax.jit(build.advantages(config), out_shardings=rows(mesh))
        assembled = jax.jit(assemble, out_shardings=rows(mesh))
        minibatch = jax.jit(take_rows, out_shardings=rows(mesh))
        needs_proximal = "proximal_logp" in required_fields(build.loss(config))

        # A fresh state, or the last checkpoint's.
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.checkpoint.keep))
        start = checkpoints.latest()
        if start is None:
            start, state = 0, init_state(load_params(directory)[1], optimizer, shardings)
            changes = write_config(workdir, config.to_dict(), resuming=False)
        else:
            changes = write_config(workdir, config.to_dict(), resuming=True)
            changes.insert(0, f"going on from the checkpoint at step {start}")
            fresh = jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params(model))
            state = checkpoints.restore(start, abstract_state(fresh, shardings))
        # The last evaluation and the export come after the last checkpoint: a kill between them is made up for.
        outstanding = start == config.steps and (config.eval.every or config.checkpoint.export)
        if start >= config.steps and not outstanding:
            print(f"nothing to do: {workdir} has {start} of {config.steps} steps\n{summary_table(workdir)}")
            return
        log = stack.enter_context(
            RunLog(
                workdir,
                hparams=config.to_dict(),
                resume_step=start,
                total_steps=config.steps,
                is_writer=jax.process_index() == 0,
            )
        )
        for sentence in changes:
            log.note(sentence)
        report = Report(log, workdir, config.log)

        for step in range(start, config.steps):
            evaluated = evaluation.at(step, state.params)

            # Rollout. Meanwhile the host writes the last step's log.
            began = time.perf_counter()
            prompts, examples = stream.batch(step)
            rollout = generate(state.params, prompts, step_key(config.seed, step, build.ROLLOUT))
            report.flush()
            mask = np.asarray(rollout.response_mask)
            replies = decode_replies(text.tokenizer, np.asarray(rollout.tokens), mask, text.eos_ids)
            rolled = time.perf_counter()

            # Rewards, on the host. Meanwhile the devices recompute the proximal policy, if the loss asks for it.
            examples = [example for example in examples for _ in range(config.rollout.group_size)]
            pending = scorer.submit(replies, examples)
            batch = assembled(prompts, rollout)
            if needs_proximal:
                proximal = score(state.params, batch)
                batch = batch.replace(proximal_logp=proximal.logp, topk_proximal_logp=proximal.ids_logp)
            rewards, verifier = pending.result()
            rewarded = time.perf_counter()

            # Advantages, minibatches, updates.
            batch = batch.replace(advantages=advantages(jnp.asarray(rewards), rollout.group))
            measured = []
            for index in build.minibatches(config, step):
                state, metrics = update(state, minibatch(batch, index))
                measured.append(metrics)
            measured = jax.device_get(measured)
            trained = time.perf_counter()

            # Metrics.
            total = metrics_lib.merge(*measured)
            scalars = {
                **metrics_lib.summary(total),
                **metrics_lib.mismatch(measured[0]),
                **metrics_lib.group_metrics(rewards, config.rollout.group_size),
                **{f"reward/{name}": float(count) for name, count in verifier.items()},
                **evaluated,
                "response/length_mean": float(mask.sum(axis=1).mean()),
                "response/truncated": float(np.asarray(rollout.truncated).mean()),
                "learning_rate": float(learning_rate(int(state.updates) - 1)),
                "time/rollout": rolled - began,
                "time/reward": rewarded - rolled,
                "time/train": trained - rewarded,
                "throughput/tokens_per_s": float(mask.sum()) / (trained - began),
            }
            if not math.isfinite(scalars["grad_norm"]):
                latest = checkpoints.latest()
                kept = "there is no checkpoint" if latest is None else f"the last checkpoint is that of step {latest}"
                raise UserError(f"step {step}: the gradient norm is {scalars['grad_norm']}, so training stops; {kept}")
            report.keep(step, scalars, total.histograms, examples, replies, rewards)

            done = step + 1
            if done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                report.flush()
                checkpoints.save(done, state)

        if evaluated := evaluation.at(config.steps, state.params):
            log.scalars(config.steps, evaluated)
        if config.checkpoint.export:
            save_hf(workdir / "policy", model, jax.device_get(state.params), text.tokenizer)
    print(summary_table(workdir))


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, metavar="DIR", help="logs and checkpoints; resumes what is there"),
            "--trace": dict(action="store_true", help="check the config and trace its shapes, without weights or data"),
        },
    )
    if arguments.trace:
        print(trace(config))
    elif arguments.workdir is None:
        raise UserError("--workdir DIR is required, for logs and checkpoints")
    else:
        train(config, arguments.workdir)


if __name__ == "__main__":
    run_main(main)
