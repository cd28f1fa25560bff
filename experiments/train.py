"""Trains a policy by reinforcement learning.

    python -m experiments.train --config configs/quickstart.py --workdir runs/quickstart [--config.loss.name=cispo]

One step: the behavior policy answers every prompt G times; the host scores the answers; rewards become advantages
within each group; the policy takes one optimizer step per minibatch, each token weighed and masked by the loss.
With train.staleness = 1 the next batch is drawn before the updates, while the host scores this one.
A run is a function of (config, seed, data): started again in the same workdir, it goes on from its last checkpoint
as if it had never stopped.
"""

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.checkpoint import Checkpoints, abstract_state
from dppo_jax.data.prompts import decode_replies
from dppo_jax.errors import UserError, run_main
from dppo_jax.lora import joined
from dppo_jax.models import save_hf
from dppo_jax.models.decoder import LOG_SIGMA, Params
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.models.peft import save_adapters
from dppo_jax.run_log import RunLog, summary_table, write_config
from dppo_jax.sampling import step_key
from dppo_jax.sharding import from_first_host, rows, to_host
from dppo_jax.train_step import TrainState, assemble, jit_update, make_recompute
from dppo_jax.types import PromptBatch, RolloutBatch, TrainBatch
from experiments import build, checks, cli
from experiments.compilations import Compilations, keep_compiled
from experiments.critic import Critic
from experiments.report import Report
from experiments.resample import AWAY, Drawn, resample
from experiments.trace import trace


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes a run. UserError, one sentence, for whatever the user can mend."""
    checks.check(config)
    keep_compiled(config.compile_cache)
    with contextlib.ExitStack() as stack:
        # Mesh, policy, optimizer.
        directory = build.model_directory(config)
        model = load_config(directory)
        checks.check_length(config, model)
        mesh = build.on_devices(config, stack)
        checks.check_mesh(config, mesh, model)
        text = build.text(directory, model)
        learning_rate = build.schedule(config)
        shardings = build.shardings(config, model, mesh)

        compilations = stack.enter_context(Compilations())

        # Data and rewards.
        stream, scorer = build.stream_and_scorer(config, config.data, text.tokenizer, config.rollout.prompts, stack)
        evaluation = build.Evaluation(config, model, mesh, text, stack)

        # What runs on the devices, each compiled once.
        layout = build.layout(config, mesh, stream.mean_prompt_length)
        generate = build.on_mesh(build.rollout(config, model, text, mesh), mesh)
        score, needed = build.score(config, model, layout, mesh), build.needed_fields(config)
        recompute = {
            name: jax.jit(make_recompute(score, name), out_shardings=rows(mesh))
            for name in ("proximal", "reference")
            if f"{name}_logp" in needed
        }
        oracle = "exact" in needed
        update = jit_update(build.update(config, model, layout, mesh), shardings, mesh, oracle=oracle)
        by_group = build.advantages(config)
        advantages = jax.jit(by_group, out_shardings=rows(mesh)) if by_group else None
        critic = None if advantages else Critic(config, model, layout, mesh)
        assembled = jax.jit(assemble, out_shardings=rows(mesh))
        copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=shardings.params)
        past: deque[Params] = deque(maxlen=config.rollout.lag + 1)  # after each of the last updates, oldest first

        def policy(params: Params) -> Params:
            """What is trained, with what is not."""
            return joined(state.frozen, params)

        def draw(step: int) -> RolloutBatch:
            params = policy(past[0] if past else state.params)
            return generate(params, stream.batch(step)[0], step_key(config.seed, step, build.ROLLOUT))

        # A fresh state, or the last checkpoint's.
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.checkpoint.keep))
        start = checkpoints.latest()
        ahead: RolloutBatch | None = None  # drawn a step early
        if start is None:
            start, state = 0, build.begin(config, model, load_params(directory)[1], shardings)
            changes = write_config(workdir, config.to_dict(), resuming=False)
            if critic:
                critic.begin(load_params(directory)[1])
        else:
            changes = write_config(workdir, config.to_dict(), resuming=True)
            changes.insert(0, f"going on from the checkpoint at step {start}")
            wanted = abstract_state(build.abstract_begin(config, model), shardings)
            extras: dict[str, Any] = {}
            if checkpoints.holds(start, "ahead"):
                key = step_key(config.seed, start, build.ROLLOUT)
                shapes = jax.eval_shape(generate, wanted.policy, stream.batch(start)[0], key)
                extras["ahead"] = abstract_state(shapes, jax.tree.map(lambda _: rows(mesh), shapes))
            if config.rollout.lag:
                done = start * config.train.epochs * config.train.minibatches
                extras["past"] = [wanted.params] * min(done + 1, config.rollout.lag + 1)
            if critic:
                extras["critic"] = critic.abstract
            found = checkpoints.restore(start, wanted.saved(**extras))
            frozen = {}
            if config.lora.rank:
                frozen = jax.device_put(load_params(directory)[1], shardings.frozen, may_alias=False)
            state = TrainState(found["params"], found["opt_state"], found["updates"], frozen)
            ahead = found.get("ahead")
            past.extend(found.get("past", []))
            if critic:
                critic.resume(found["critic"])
        if config.rollout.lag and not past:
            past.append(copy(state.params))
        reference: Params = {}
        if "reference" in recompute:
            begun = build.trained(config, build.initial(config, model, load_params(directory)[1]))
            reference = jax.device_put(begun, shardings.params)
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
        if build.platform(mesh) != "cpu":
            kernel = build.attention(config, model, mesh, dtype=config.policy.dtype, length=layout.length)
            log.note(f"attention of training: {kernel.name} ({kernel.why})")
        report = Report(log, workdir, config.log, lambda token: text.tokenizer.decode([token]))

        def report_compilations(step: int) -> float:
            """Seconds spent compiling since the last step; says so where it should not have happened."""
            found = compilations.take()
            if found.functions and step == start:
                cached = f"{found.cached} from the cache"
                log.note(f"compiled {found.functions} functions in {found.seconds:.1f} s, {cached}")
            elif found.functions:
                log.note(f"step {step}: {found.functions} functions were compiled after the first step: {found.names}")
            return found.seconds

        def plan_of(prompts: PromptBatch) -> Callable[..., packing.Plan]:
            """(row numbers, response_lengths=of all rows) -> their plan."""
            lengths: np.ndarray = np.repeat(prompts.mask.sum(axis=1), config.rollout.group_size)
            return functools.partial(packing.plan, prompt_lengths=lengths, shape=layout, packed=config.train.pack)

        def recomputed(batch: TrainBatch, place, mask: np.ndarray, behavior: Params) -> TrainBatch:
            """With the log-probabilities of the other policies that the loss asks for."""
            for name, fill_in in recompute.items():
                params = behavior if name == "proximal" else reference
                batch = fill_in(policy(params), batch, place(np.arange(len(mask)), response_lengths=mask.sum(axis=1)))
            return batch

        def draw_again(step: int, attempt: int) -> Drawn:
            """One more batch for a step, of other prompts, with its rewards."""
            elsewhere = step + attempt * AWAY
            prompts, examples = stream.batch(elsewhere)
            rollout = draw(elsewhere)
            tokens, mask, truncated = to_host((rollout.tokens, rollout.response_mask, rollout.truncated))
            replies = decode_replies(text.tokenizer, tokens, mask, text.eos_ids)
            examples = [example for example in examples for _ in range(config.rollout.group_size)]
            rewards = from_first_host(scorer.submit(replies, examples).result()[0])
            shaped = rewards + build.shaping(config, mask.sum(axis=1))
            return Drawn(prompts, rollout, examples, replies, mask, truncated, rewards, shaped)

        for step in range(start, config.steps):
            evaluated = evaluation.at(step, state.policy)

            # Rollout. Meanwhile the host writes the last step's log.
            began = time.perf_counter()
            prompts, examples = stream.batch(step)
            rollout, ahead = draw(step) if ahead is None else ahead, None
            behavior = past[0] if past else copy(state.params) if oracle else state.params
            report.flush()
            tokens, mask, truncated = to_host((rollout.tokens, rollout.response_mask, rollout.truncated))
            rolled = time.perf_counter()

            # Rewards, on the host. Meanwhile the devices draw the next batch, or recompute the proximal policy.
            if config.train.staleness and step + 1 < config.steps:
                ahead = draw(step + 1)
            replies = decode_replies(text.tokenizer, tokens, mask, text.eos_ids)
            examples = [example for example in examples for _ in range(config.rollout.group_size)]
            pending = scorer.submit(replies, examples)
            batch = assembled(prompts, rollout)
            place = plan_of(prompts)
            if not config.rollout.resample:
                batch = recomputed(batch, place, mask, behavior)
            rewards, verifier = pending.result()
            rewards = from_first_host(rewards)
            shaped = rewards + build.shaping(config, mask.sum(axis=1))
            redrawn = 0
            if config.rollout.resample:
                first = Drawn(prompts, rollout, examples, replies, mask, truncated, rewards, shaped)
                drawn, redrawn = resample(
                    first,
                    functools.partial(draw_again, step),
                    mesh,
                    most=config.rollout.resample,
                    group_size=config.rollout.group_size,
                )
                prompts, rollout, examples, replies, mask, truncated, rewards, shaped = drawn
                place = plan_of(prompts)
                batch = recomputed(assembled(prompts, rollout), place, mask, behavior)
            rewarded = time.perf_counter()

            # Advantages, minibatches, updates.
            lengths = mask.sum(axis=1)
            if advantages:
                batch = batch.replace(advantages=advantages(jnp.asarray(shaped), rollout.group))
            elif critic:
                everything = place(np.arange(len(tokens)), response_lengths=lengths)
                batch = batch.replace(advantages=critic.advantages(batch, everything, shaped))
            if config.advantage.drop_equal:
                unequal = metrics_lib.unequal_groups(shaped, config.rollout.group_size)
                batch, lengths = batch.replace(mask=batch.mask & unequal[:, None]), np.where(unequal, lengths, 0)
            plans = [place(index, response_lengths=lengths) for index in build.minibatches(config, step)]
            measured = []
            for plan in plans:
                state, metrics = update(state, batch, plan, *([behavior] if oracle else []))
                measured.append(metrics if critic is None else metrics | critic.update(batch, plan))
                if past:
                    past.append(copy(state.params))
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
                "rollout/resampled": float(redrawn),
                "response/length_mean": float(mask.sum(axis=1).mean()),
                "response/truncated": float(truncated.mean()),
                "train/occupancy": packing.occupancy(*plans),
                "learning_rate": float(learning_rate(int(state.updates) - 1)),
                "time/rollout": rolled - began,
                "time/reward": rewarded - rolled,
                "time/train": trained - rewarded,
                "time/compile": report_compilations(step),
                "throughput/tokens_per_s": float((1 + redrawn) * mask.sum()) / (trained - began),
            }
            if not math.isfinite(scalars["grad_norm"]):
                latest = checkpoints.latest()
                kept = "there is no checkpoint" if latest is None else f"the last checkpoint is that of step {latest}"
                raise UserError(f"step {step}: the gradient norm is {scalars['grad_norm']}, so training stops; {kept}")
            report.keep(step, scalars, total.histograms, examples, replies, rewards)

            done = step + 1
            if done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                report.flush()
                checkpoints.save(
                    done,
                    state.saved(
                        ahead=ahead, past=list(past) if past else None, critic=critic.saved() if critic else None
                    ),
                )

        if evaluated := evaluation.at(config.steps, state.policy):
            log.scalars(config.steps, evaluated)
        if config.checkpoint.export:
            merge = build.merged(config)
            whole = state.policy if merge is None else jax.jit(merge)(state.policy)
            params = {key: value for key, value in to_host(whole).items() if key != LOG_SIGMA}
            adapters = to_host(state.params) if config.lora.rank else None
            if jax.process_index() == 0:
                save_hf(workdir / "policy", model, params, text.tokenizer)
                if adapters:
                    save_adapters(workdir / "adapter", build.adapted(config, model), adapters, str(directory))
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
