"""Trains losses × seeds at once: one compiled step for all runs, mapped over both.

    python -m experiments.sweep --config configs/reuse.py --workdir DIR --losses pg_is,kpop --config.eval.every=0

For models so small that one run leaves the machine idle. Every run has a folder DIR/LOSS/seed_N of its own with
TensorBoard logs and HParams, as if experiments.train had made it: the same prompts, keys and numbers, up to float
rounding. Started again, it goes on from its last checkpoint. A loss has its loss_defaults; anything else, such as the
advantages and the aggregation, is the config's. --rates scales optimizer.learning_rate, and names the runs LOSS_xRATE.
"""

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.checkpoint import Checkpoints
from dppo_jax.data.prompts import decode_replies
from dppo_jax.errors import UserError, lookup, run_main
from dppo_jax.losses import LOSSES, LossInputs, LossOutput
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.run_log import RunLog, write_config
from dppo_jax.sampling import step_key
from dppo_jax.train_step import assemble, init_state, make_recompute, make_update
from dppo_jax.weights import WEIGHTS
from experiments import build, checks, cli
from experiments.compilations import keep_compiled


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
    own.optimizer.learning_rate = config.optimizer.learning_rate * run.rate
    return own


def check(config: ConfigDict, runs: list[Run]) -> None:
    """Refuses what a sweep cannot batch. UserError, one sentence."""
    for run in runs:
        if run.loss not in LOSSES:
            build.bind(run.loss, {})  # names the nearest
        checks.check(config_of(config, run))
    refused = {
        "advantage.name": config.advantage.name == "gae",
        "rollout.resample": config.rollout.resample,
        "train.staleness": config.train.staleness,
        "alp.sigma": config.alp.sigma,
        "lora.rank": config.lora.rank,
        "eval.every": config.eval.every,
        "log.regions": config.log.regions,
        "log.tokens": config.log.tokens,
        "reference.coef": config.reference.coef,
    }
    for key, used in refused.items():
        if used:
            raise UserError(f"a sweep does without {key}: leave it at its default, or use experiments.train")
    given = [key for key, value in config.loss.items() if key != "name" and value is not None]
    if given:
        raise UserError(f"a sweep takes loss_defaults, not loss.{given[0]}: set loss_defaults.LOSS.{given[0]}")


def _mapped(function):
    """vmap's meaning, one run after another."""
    return lambda *arguments: jax.lax.map(lambda own: function(*own), arguments)


# How a function of one run becomes one of all. On a CPU, runs in turns are faster than runs at once: a batched while
# loop copies its whole state every step, and there are no lanes to fill.
OVER = {"vmap": jax.vmap, "map": _mapped}


class Sweep:
    """All runs, stacked along the first axis of every array. `over`: vmap, map, or auto (map on a CPU, else vmap)."""

    def __init__(self, config: ConfigDict, runs: list[Run], workdir: Path, *, over: str = "auto"):
        check(config, runs)
        if over == "auto":
            over = "map" if jax.default_backend() == "cpu" else "vmap"
        each = lookup(OVER, over, "--over")
        keep_compiled(config.compile_cache)
        self.config, self.runs, self._workdir = config, runs, workdir
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(jax.default_matmul_precision(config.policy.matmul))
        directory = build.model_directory(config)
        self.model = load_config(directory)
        checks.check_length(config, self.model)
        self.text = build.text(directory, self.model)
        self._params = jax.tree.map(jnp.asarray, load_params(directory)[1])
        # One stream of prompts a seed; one scorer for all.
        self._streams = {}
        for seed in sorted({run.seed for run in runs}):
            own = config_of(config, Run(runs[0].loss, seed, 1.0))
            self._streams[seed], self._scorer = build.stream_and_scorer(
                own, own.data, self.text.tokenizer, own.rollout.prompts, self._stack
            )
        names = sorted({run.loss for run in runs})
        configs = {name: config_of(config, Run(name, 0, 1.0)) for name in names}
        needed = frozenset().union(*(build.needed_fields(c) for c in configs.values()))
        self.layout = build.layout(config, None, next(iter(self._streams.values())).mean_prompt_length)
        tracked = config.rollout.tracked if "topk" in needed else 0
        generate = build.rollout(config, self.model, self.text, tracked=tracked)
        self._generate = jax.jit(each(generate))
        self._assemble = jax.jit(jax.vmap(assemble))
        self._advantages = jax.jit(jax.vmap(build.advantages(config)))
        score = build.score(config, self.model, self.layout)
        self._recompute = None
        if "proximal_logp" in needed:
            self._recompute = jax.jit(each(make_recompute(score, "proximal")))
        losses = [build.loss(configs[name]) for name in names]
        weigh = functools.partial(WEIGHTS[config.aggregation.name], constant=config.aggregation.constant)
        base = build.optimizer(config)
        self._oracle = build.oracle(config, self.model, self.layout) if "exact" in needed else None

        def update(state, batch, plan, index, rate, *behavior):
            """One run's update; the loss is that of its index."""

            def loss(inputs: LossInputs) -> LossOutput:
                def bare(one):
                    def plain(inputs):
                        found = one(inputs)
                        return found.coef, found.keep

                    return plain

                coef, keep = jax.lax.switch(index, [bare(one) for one in losses], inputs)
                return LossOutput(coef=coef, keep=keep, metrics={})

            scaled = optax.chain(base, optax.stateless(lambda u, _: jax.tree.map(lambda x: rate * x, u)))
            return make_update(score, loss, weigh, scaled, oracle=self._oracle)(state, batch, plan, *behavior)

        self._update = jax.jit(each(update), donate_argnums=0)
        scaled = optax.chain(base, optax.stateless(lambda u, _: u))
        self._fresh = jax.jit(lambda p: jax.vmap(lambda _: init_state(p, scaled))(jnp.arange(len(runs))))
        self._index = jnp.asarray([names.index(run.loss) for run in runs], jnp.int32)
        self._rate = jnp.asarray([run.rate for run in runs], jnp.float32)

    def close(self) -> None:
        """Stops the verifiers."""
        self._stack.close()

    def _copy(self, state):
        return jax.tree.map(jnp.copy, state.params)

    def train(self) -> None:
        """From the last checkpoint to the end."""
        with contextlib.ExitStack() as logs:
            checkpoints = logs.enter_context(Checkpoints(self._workdir, keep=self.config.checkpoint.keep))
            state = self._fresh(self._params)
            lag, past = self.config.rollout.lag, [self._copy(state)] if self.config.rollout.lag else []
            start = checkpoints.latest() or 0
            if start:
                updates = start * self.config.train.epochs * self.config.train.minibatches
                extras = {"past": past * min(updates + 1, lag + 1)} if lag else {}
                found = checkpoints.restore(start, jax.eval_shape(lambda: state.saved(**extras)))
                state = type(state)(found["params"], found["opt_state"], found["updates"])
                past = list(found.get("past", []))
            writers = []
            for run in self.runs:
                folder, own = self._workdir / run.folder, config_of(self.config, run).to_dict()
                write_config(folder, own, resuming=start > 0)
                log = RunLog(folder, hparams=own, resume_step=start, total_steps=self.config.steps, is_writer=True)
                writers.append(logs.enter_context(log))
            for step in range(start, self.config.steps):
                began = time.perf_counter()
                state, past, scalars = self._step(state, past, step)
                seconds = time.perf_counter() - began
                for log, own in zip(writers, scalars, strict=True):
                    log.scalars(step, own | {"time/step": seconds / len(self.runs)})
                mean = np.mean([own["reward/mean"] for own in scalars])
                print(f"step {step + 1}/{self.config.steps}  reward {mean:.3f}  {seconds:.2f} s", file=sys.stderr)
                done = step + 1
                every = self.config.checkpoint.every
                if done == self.config.steps or (every and done % every == 0):
                    checkpoints.save(done, state.saved(past=past if past else None))

    def _step(self, state, past: list[Any], step: int):
        c, count = self.config, len(self.runs)
        by_seed = {seed: stream.batch(step) for seed, stream in self._streams.items()}
        prompts = jax.tree.map(lambda *x: np.stack(x), *(by_seed[run.seed][0] for run in self.runs))
        keys = jnp.stack([step_key(run.seed, step, build.ROLLOUT) for run in self.runs])
        behavior = past[0] if past else self._copy(state) if self._oracle else state.params
        rollout = self._generate(behavior, prompts, keys)
        tokens, mask, truncated = jax.device_get((rollout.tokens, rollout.response_mask, rollout.truncated))
        group = c.rollout.group_size
        flat, inside = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
        replies = decode_replies(self.text.tokenizer, flat, inside, self.text.eos_ids)
        examples = [example for run in self.runs for example in by_seed[run.seed][1] for _ in range(group)]
        rewards = self._scorer.submit(replies, examples).result()[0].reshape(count, -1)
        shaped = rewards + np.stack([build.shaping(c, m.sum(axis=1)) for m in mask])
        batch = self._assemble(prompts, rollout)
        batch = batch.replace(advantages=self._advantages(jnp.asarray(shaped), rollout.group))

        def plans(indices, lengths) -> packing.Plan:
            """The plans of one minibatch of every run, stacked."""
            each = [
                packing.plan(index, np.repeat(p.sum(axis=1), group), length, self.layout, packed=c.train.pack)
                for index, p, length in zip(indices, prompts.mask, lengths, strict=True)
            ]
            return jax.tree.map(lambda *x: np.stack(x), *each)

        lengths = mask.sum(axis=2)
        if self._recompute is not None:
            batch = self._recompute(behavior, batch, plans([np.arange(mask.shape[1])] * count, lengths))
        if c.advantage.drop_equal:
            unequal = np.stack([metrics_lib.unequal_groups(x, group) for x in shaped])
            batch, lengths = batch.replace(mask=batch.mask & unequal[..., None]), np.where(unequal, lengths, 0)
        measured = []
        order = [list(build.minibatches(config_of(c, run), step)) for run in self.runs]
        for indices in zip(*order, strict=True):
            extras = [behavior] if self._oracle else []
            state, metrics = self._update(state, batch, plans(indices, lengths), self._index, self._rate, *extras)
            measured.append(metrics)
            if past:
                past = [*past, self._copy(state)][-c.rollout.lag - 1 :]
        measured = jax.device_get(measured)
        scalars = []
        for number in range(count):
            own = [jax.tree.map(lambda x, n=number: x[n], metrics) for metrics in measured]
            scalars.append(
                {
                    **metrics_lib.summary(metrics_lib.merge(*own)),
                    **metrics_lib.mismatch(own[0]),
                    **metrics_lib.group_metrics(rewards[number], group),
                    "response/length_mean": float(mask[number].sum(axis=1).mean()),
                    "response/truncated": float(truncated[number].mean()),
                }
            )
        return state, past, scalars


def train(config: ConfigDict, runs: list[Run], workdir: Path, *, over: str = "auto") -> None:
    """Trains the runs from their last checkpoint to the end; a sweep that is finished stays as it is."""
    with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
        if checkpoints.latest() == config.steps:
            return
    sweep = Sweep(config, runs, workdir, over=over)
    try:
        sweep.train()
    finally:
        sweep.close()


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each run; resumes"),
            "--losses": dict(type=cli.by_commas(), required=True, metavar="NAMES", help="by commas"),
            "--seeds": dict(type=int, default=3, metavar="N", help="seeds from config.seed on (3)"),
            "--over": dict(default="auto", metavar="HOW", help="vmap: runs at once | map: in turns | auto"),
            "--rates": dict(
                type=cli.by_commas(float), default="1", metavar="NUMBERS", help="factors of the learning rate (1)"
            ),
        },
    )
    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {arguments.seeds}")
    runs = [
        Run(loss, seed, rate)
        for loss in arguments.losses
        for rate in arguments.rates
        for seed in range(config.seed, config.seed + arguments.seeds)
    ]
    train(config, runs, arguments.workdir, over=arguments.over)


if __name__ == "__main__":
    run_main(main)
