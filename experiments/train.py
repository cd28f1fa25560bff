"""Trains a policy by reinforcement learning.

    python -m experiments.train --config configs/quickstart.py --workdir runs/quickstart [--config.loss.name=cispo]

One step: the behavior policy answers every prompt G times; the host scores the answers; rewards become advantages
within each group; the policy takes one optimizer step per minibatch, each token weighed and masked by the loss.
With train.staleness = 1 the next batch is drawn before the updates, while the host scores this one.
A run is a function of (config, seed, data): started again in the same workdir, it goes on from its last checkpoint
as if it had never stopped. On several hosts (docs/pods.md) each prepares and scores the rows that its devices hold.
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

from dppo_jax import hosts, packing
from dppo_jax import metrics as metrics_lib
from dppo_jax.checkpoint import Checkpoints, abstract_state
from dppo_jax.data.examples import Example
from dppo_jax.data.prompts import decode_replies
from dppo_jax.errors import UserError
from dppo_jax.lora import joined
from dppo_jax.models import save_hf
from dppo_jax.models.decoder import LOG_SIGMA, Params
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.models.peft import save_adapters
from dppo_jax.rewards.scorer import Pending
from dppo_jax.run_log import RunLog, summary_table, write_config
from dppo_jax.sampling import step_key
from dppo_jax.sharding import rows, to_host
from dppo_jax.train_step import TrainState, assemble, jit_update, make_recompute
from dppo_jax.types import PromptBatch, RolloutBatch, TrainBatch
from experiments import build, checks, cli, peers
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

        # The prompts and the responses of this host.
        asked = hosts.share(rows(mesh), config.rollout.prompts)
        mine = asked.grouped(config.rollout.group_size)

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

        def ask(step: int) -> tuple[PromptBatch, list[Example]]:
            """The prompts of a step, and the example of every response that this host scores."""
            prompts, examples = stream.batch(step, asked.held)
            own = [example for example in asked.of_owned(examples) for _ in range(config.rollout.group_size)]
            return hosts.place(prompts, rows(mesh), asked), own

        def draw(step: int) -> RolloutBatch:
            params = policy(past[0] if past else state.params)
            return generate(params, ask(step)[0], step_key(config.seed, step, build.ROLLOUT))

        def read(rollout: RolloutBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            """Tokens and mask of this host's responses; lengths i[B] and truncated bool[B] of all of them."""
            fields = rollout.tokens, rollout.response_mask, rollout.truncated
            tokens, mask, truncated = hosts.owned(fields, mine)
            return tokens, mask, *hosts.gather((mask.sum(axis=1, dtype=np.int32), truncated), mine)

        def agreed(pending: Pending) -> tuple[np.ndarray, dict[str, int]]:
            """Rewards f32[B] of all responses and the verifier's counts, once every host has scored its own."""
            rewards, verifier = pending.result()
            return hosts.gather(rewards, mine), hosts.total(verifier)

        # A fresh state, or the last checkpoint's.
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.checkpoint.keep))
        start, passed_over = checkpoints.newest_whole()
        ahead: RolloutBatch | None = None  # drawn a step early
        if start is None:
            start, state = 0, build.begin(config, model, load_params(directory)[1], shardings)
            changes = write_config(workdir, config.to_dict(), resuming=False, is_writer=hosts.is_writer())
            if critic:
                critic.begin(load_params(directory)[1])
        else:
            changes = write_config(workdir, config.to_dict(), resuming=True, is_writer=hosts.is_writer())
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
        changes = passed_over + changes
        if config.rollout.lag and not past:
            past.append(copy(state.params))
        reference: Params = {}
        if "reference" in recompute:
            begun = build.trained(config, build.initial(config, model, load_params(directory)[1]))
            reference = jax.device_put(begun, shardings.params)
        # The last evaluation and the export come after the last checkpoint: a kill between them is made up for.
        outstanding = start == config.steps and (config.eval.every or config.checkpoint.export)
        if start >= config.steps and not outstanding:
            if hosts.is_writer():
                print(f"nothing to do: {workdir} has {start} of {config.steps} steps\n{summary_table(workdir)}")
            return
        log = stack.enter_context(
            RunLog(
                workdir,
                hparams=config.to_dict(),
                resume_step=start,
                total_steps=config.steps,
                is_writer=hosts.is_writer(),
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

        def plan_of(prompt_lengths: np.ndarray) -> Callable[..., packing.Plan]:
            """(row numbers, response_lengths=of all rows) -> their plan; prompt_lengths i[N]."""
            lengths: np.ndarray = np.repeat(prompt_lengths, config.rollout.group_size)
            return functools.partial(packing.plan, prompt_lengths=lengths, shape=layout, packed=config.train.pack)

        def recomputed(batch: TrainBatch, place, lengths: np.ndarray, behavior: Params) -> TrainBatch:
            """With the log-probabilities of the other policies that the loss asks for."""
            for name, fill_in in recompute.items():
                params = policy(behavior if name == "proximal" else reference)
                batch = fill_in(params, batch, place(np.arange(len(lengths)), response_lengths=lengths))
            return batch

        def draw_again(step: int, attempt: int) -> Drawn:
            """One more batch for a step, of other prompts, with its rewards."""
            elsewhere = step + attempt * AWAY
            prompts, examples = ask(elsewhere)
            rollout = draw(elsewhere)
            tokens, mask, lengths, truncated = read(rollout)
            replies = decode_replies(text.tokenizer, tokens, mask, text.eos_ids)
            rewards, _ = agreed(scorer.submit(replies, examples))
            shaped = rewards + build.shaping(config, lengths)
            answers = dict(zip(mine.owned.tolist(), zip(examples, replies, strict=True), strict=True))
            return Drawn(prompts, stream.lengths(elsewhere), rollout, answers, lengths, truncated, rewards, shaped)

        for step in range(start, config.steps):
            evaluated = evaluation.at(step, state.policy)

            # Rollout. Meanwhile the host writes the last step's log.
            began = time.perf_counter()
            prompts, examples = ask(step)
            rollout, ahead = draw(step) if ahead is None else ahead, None
            behavior = past[0] if past else copy(state.params) if oracle else state.params
            report.flush()
            tokens, mask, lengths, truncated = read(rollout)
            rolled = time.perf_counter()

            # Rewards, each host its own. Meanwhile the devices draw the next batch, or recompute the proximal policy.
            if config.train.staleness and step + 1 < config.steps:
                ahead = draw(step + 1)
            replies = decode_replies(text.tokenizer, tokens, mask, text.eos_ids)
            pending = scorer.submit(replies, examples)
            batch = assembled(prompts, rollout)
            prompt_lengths = stream.lengths(step)
            place = plan_of(prompt_lengths)
            if not config.rollout.resample:
                batch = recomputed(batch, place, lengths, behavior)
            rewards, verifier = agreed(pending)
            shaped = rewards + build.shaping(config, lengths)
            answers = dict(zip(mine.owned.tolist(), zip(examples, replies, strict=True), strict=True))
            redrawn = 0
            if config.rollout.resample:
                first = Drawn(prompts, prompt_lengths, rollout, answers, lengths, truncated, rewards, shaped)
                drawn, redrawn = resample(
                    first,
                    functools.partial(draw_again, step),
                    mesh,
                    most=config.rollout.resample,
                    group_size=config.rollout.group_size,
                )
                prompts, prompt_lengths, rollout, answers, lengths, truncated, rewards, shaped = drawn
                place = plan_of(prompt_lengths)
                batch = recomputed(assembled(prompts, rollout), place, lengths, behavior)
            rewarded = time.perf_counter()

            # Advantages, minibatches, updates.
            given, used = jnp.asarray(hosts.place(shaped[mine.held], rows(mesh), mine)), lengths
            if advantages:
                batch = batch.replace(advantages=advantages(given, rollout.group))
            elif critic:
                everything = place(np.arange(len(lengths)), response_lengths=lengths)
                batch = batch.replace(advantages=critic.advantages(batch, everything, given))
            if config.advantage.drop_equal:
                unequal = metrics_lib.unequal_groups(shaped, config.rollout.group_size)
                batch, used = batch.replace(mask=batch.mask & unequal[:, None]), np.where(unequal, lengths, 0)
            plans = [place(index, response_lengths=used) for index in build.minibatches(config, step)]
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
                "response/length_mean": float(lengths.mean()),
                "response/truncated": float(truncated.mean()),
                "train/occupancy": packing.occupancy(*plans),
                "learning_rate": float(learning_rate(int(state.updates) - 1)),
                "time/rollout": rolled - began,
                "time/reward": rewarded - rolled,
                "time/train": trained - rewarded,
                "time/compile": report_compilations(step),
                "throughput/tokens_per_s": float((1 + redrawn) * lengths.sum()) / (trained - began),
            }
            if not math.isfinite(scalars["grad_norm"]):
                latest = checkpoints.latest()
                kept = "there is no checkpoint" if latest is None else f"the last checkpoint is that of step {latest}"
                raise UserError(f"step {step}: the gradient norm is {scalars['grad_norm']}, so training stops; {kept}")
            report.keep(step, scalars, total.histograms, answers, rewards)

            done = step + 1
            due = done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0)
            stopping = peers.asked_to_stop(done)
            if due or stopping:
                report.flush()
                checkpoints.save(
                    done,
                    state.saved(
                        ahead=ahead, past=list(past) if past else None, critic=critic.saved() if critic else None
                    ),
                )
            if stopping and done < config.steps:
                raise UserError(f"asked to stop, after step {done}; started again, the run goes on from its checkpoint")

        if evaluated := evaluation.at(config.steps, state.policy):
            log.scalars(config.steps, evaluated)
        if config.checkpoint.export:
            merge = build.merged(config)
            whole = state.policy if merge is None else jax.jit(merge)(state.policy)
            params = {key: value for key, value in to_host(whole).items() if key != LOG_SIGMA}
            adapters = to_host(state.params) if config.lora.rank else None
            if hosts.is_writer():
                save_hf(workdir / "policy", model, params, text.tokenizer)
                if adapters:
                    save_adapters(workdir / "adapter", build.adapted(config, model), adapters, str(directory))
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
