"""Fine-tunes a policy on rows of prompts and completions: a warm start for reinforcement learning.

    python -m experiments.sft --config configs/base.py --workdir runs/sft --config.policy.path=assets/tiny \
        --config.data.kind=jsonl --config.data.path=rows.jsonl --config.checkpoint.export=True

The loss is the cross-entropy of the completions' tokens, their ends included, a mean over the tokens of a minibatch, at
temperature 1. Packing, optimizer, mesh, checkpoints and logs are those of experiments.train, which takes the exported
WORKDIR/policy as its policy.path. Started again in the same workdir, a run goes on as if it had never stopped.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.data.examples import Example
from dppo_jax.data.prompts import PromptStream, encode_completion
from dppo_jax.data.tasks import load_task
from dppo_jax.devices import hosts, peers
from dppo_jax.errors import UserError
from dppo_jax.files import Path, user_path
from dppo_jax.losses import zero_outside_mask
from dppo_jax.models.decoder import Params
from dppo_jax.packing import Plan
from dppo_jax.storage.run_log import first_and_last, read_scalars
from dppo_jax.teacher_forced import make_recompute
from dppo_jax.types import LossInputs, LossOutput, PromptBatch, TrainBatch
from experiments.run import cli
from experiments.run.export import export
from experiments.run.identity import identity, same_config_everywhere, same_everywhere
from experiments.run.learner import Learner
from experiments.run.load import load_setup
from experiments.run.record import Record
from experiments.run.remarks import remarks
from experiments.run.run_folder import RunFolder
from experiments.run.runs import Runs
from experiments.run.setup import Setup

# What a run that draws nothing has of the config: one optimizer step a batch, without what is of rollouts and rewards.
FIXED = {
    "policy.temperature": 1.0, "rollout.group_size": 1, "rollout.slots": 0, "rollout.lag": 0, "rollout.resample": 0,
    "rollout.in_flight": 0, "rollout.max_age": None, "rollout.router_replay": False, "data.verifier": "exact_match",
    "reward.function": "", "reward.overlong_filter": False, "advantage.name": "reward", "advantage.drop_equal": False,
    "advantage.ddof": 0,
    "reference.coef": 0.0, "alp.sigma": 0.0, "loss.name": "reinforce", "aggregation.name": "token_mean",
    "train.minibatches": 1, "train.epochs": 1, "train.staleness": 0, "eval.every": 0, "log.regions": (),
    "log.tokens": 0,
}  # fmt: skip
TOKENS = "completion"  # of an example's meta: the ids of its completion


def likelihood(inputs: LossInputs) -> LossOutput:
    """c = 1: the gradient of the mean log-likelihood of the tokens, whoever wrote them."""
    inputs = zero_outside_mask(inputs)
    ones = inputs.mask.astype(jnp.float32)
    return LossOutput(coef=ones, keep=inputs.mask, metrics={"sft/loss": (-inputs.logp, inputs.mask)})


class Tuning(Setup):
    """A setup whose loss is the likelihood."""

    @functools.cached_property
    def loss(self) -> functools.partial:
        return functools.partial(likelihood)


class NothingDrawn:
    """In the sampler's place: a checkpoint holds the learner's state alone."""

    def saved(self) -> dict[str, Any]:
        return {}

    def shapes(self, step: int, params: Any, policy: Any, held: Any = None) -> dict[str, Any]:
        return {}

    def restore(self, saved: dict[str, Any], params: Params, frozen: Params, step: int) -> None:
        pass


def tuning_config(config: ConfigDict) -> ConfigDict:
    """The config with `FIXED`, sft.batch rows a step, and no evaluation sets. UserError for data that is no rows."""
    c = config.copy_and_resolve_references()
    if c.data.kind in ("reasoning_gym", "environment"):
        raise UserError("experiments.sft reads rows of prompts and completions: set data.kind to jsonl, parquet or hub")
    if c.data.columns.answer:
        raise UserError(
            f"data.columns.answer = {c.data.columns.answer!r} is of answers: name the completion's column by sft.column"
        )
    c.update_from_flattened_dict({**FIXED, "rollout.prompts": c.sft.batch})
    c.loss.update({key: None for key in c.loss if key != "name"})
    with c.unlocked():
        c.eval.sets = ConfigDict()
    return c


class Rows:
    """The rows of data, or those of sft.held_out, in tokens. `remarks` and `counts` are for the log.

    UserError for a row that has no completion, or is too long where data.too_long is "error".
    """

    def __init__(self, setup: Setup, *, held_out: bool = False):
        c, data, text = setup.config, setup.config.data, setup.text
        self._config, self._text = c, text
        end = text.tokenizer.eos_token_id
        self._end = end if end in text.eos_ids else text.eos_ids[0]
        kind, path = data.kind, data.path
        if held_out:
            path = c.sft.held_out
            kind = ("parquet" if path.endswith(".parquet") else "jsonl") if kind == "hub" else kind
        try:
            task = load_task(
                kind,
                subset=data.subset,
                split=data.split,
                revision=data.commit or data.revision,
                name=data.name,
                path=path and str(user_path(path, "sft.held_out" if held_out else "data.path", pattern=True)),
                size=None if held_out else data.size,
                verifier="none",
                columns={"prompt": data.columns.prompt, "answer": c.sft.column},
                answer_from=data.answer_from,
                bad_label=data.bad_label,
                last_turn=True,
            )
        except UserError as error:
            sentence = str(error).replace("data.columns.answer", "sft.column")
            raise UserError(sentence.replace("data.path", "sft.held_out") if held_out else sentence) from None
        encoded = [self._encoded(example) for example in task.examples]
        examples = [example for example in encoded if example is not None]
        if not examples:
            raise UserError(f"{task.name}: no completion fits into rollout.max_new_tokens={c.rollout.max_new_tokens}")
        self.stream = PromptStream(
            dataclasses.replace(task, examples=examples),
            text.tokenizer,
            num_prompts=c.sft.batch,
            max_prompt_len=data.max_prompt_len,
            seed=c.seed,
            chat=data.chat,
            template=data.template,
            chat_kwargs=data.chat_kwargs.to_dict(),
            date=data.date,
            too_long=data.too_long,
        )
        self._too_long = len(encoded) - len(examples)

    def _encoded(self, example: Example) -> Example | None:
        """With its completion's tokens; None where these are too many and such rows are left out."""
        limit = self._config.rollout.max_new_tokens
        try:
            if example.also:
                raise UserError(f"{self._config.sft.column!r} holds several texts, and a row has one completion")
            ids = encode_completion(self._text.tokenizer, example.answer, self._end)
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from None
        if len(ids) <= limit:
            return dataclasses.replace(example, meta={TOKENS: ids})
        if self._config.data.too_long == "error":
            raise UserError(
                f"{example.where}: the completion ({example.answer!r:.60}) has {len(ids)} tokens with its end, more "
                f"than rollout.max_new_tokens={limit}; raise it, or set data.too_long='skip'"
            )
        return None

    @property
    def remarks(self) -> list[str]:
        """Sentences on how the rows are read, and what of them is not used."""
        limit = self._config.rollout.max_new_tokens
        left_out = [f"{self._too_long} completions of more than rollout.max_new_tokens={limit} tokens are left out"]
        return self.stream.remarks + (left_out if self._too_long else [])

    @property
    def counts(self) -> dict[str, float]:
        """By name, "too_long" the rows that are left out for their completions."""
        return {name: float(count) for name, count in self.stream.counts.items()} | {"too_long": float(self._too_long)}


class Packer:
    """Batches of sft.batch rows on the devices, and the plans by which they are packed."""

    def __init__(self, setup: Setup):
        self._setup, self._share = setup, hosts.share_over(setup.mesh, setup.config.sft.batch)

    def __call__(self, prompts: PromptBatch, examples: Sequence[Example]) -> tuple[TrainBatch, Plan, int]:
        """The batch, its plan and its number of trained tokens. Rows beyond the last example have no completion."""
        setup, count = self._setup, len(prompts.tokens)
        tokens: np.ndarray = np.full((count, setup.config.rollout.max_new_tokens), setup.text.pad_id, np.int32)
        mask: np.ndarray = np.zeros(tokens.shape, bool)
        for row, example in enumerate(examples):
            ids = example.meta[TOKENS]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        zeros: np.ndarray = np.zeros(tokens.shape, np.float32)
        batch = TrainBatch(prompts.tokens, prompts.mask, tokens, mask, zeros, zeros[:, 0])
        held = jax.tree.map(lambda x: x[self._share.held], batch)
        plan = packing.plan(
            np.arange(count),
            prompt_lengths=prompts.mask.sum(axis=1),
            response_lengths=mask.sum(axis=1),
            shape=setup.pack_shape,
            packed=setup.config.train.pack,
        )
        return hosts.to_global(held, setup.mesh, self._share), plan, int(mask.sum())


class HeldOut:
    """The loss on the rows of sft.held_out, if there are any, every so many steps and at the end."""

    def __init__(self, setup: Setup, rows: Rows | None, packer: Packer, every: int):
        self._rows, self._packer, self._every = rows, packer, every
        self._size, self._steps = setup.config.sft.batch, setup.config.steps
        self._score = jax.jit(make_recompute(setup.policy_logprobs, "reference"), out_shardings=setup.by_row)
        self._total = jax.jit(lambda batch: jnp.sum(jnp.where(batch.mask, -batch.reference_logp, 0.0)))

    def at(self, step: int, learner: Learner) -> dict[str, float]:
        """{"sft/held_out_loss": the mean over all tokens, in nats}, or nothing when the step has no measurement."""
        if self._rows is None or not (step % self._every == 0 or step == self._steps):
            return {}
        total, tokens = 0.0, 0
        for prompts, examples in self._rows.stream.eval_batches(self._size):
            batch, plan, count = self._packer(prompts, examples)
            total += float(self._total(self._score(learner.state.policy, batch, plan)))
            tokens += count
        return {"sft/held_out_loss": total / tokens}


def tune(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes a run. UserError, one sentence, for whatever the user can mend."""
    with contextlib.ExitStack() as stack:
        same_config_everywhere(config)
        try:
            loaded = load_setup(tuning_config(config), stack, begun=workdir, unread=("teacher",))
        except UserError as error:
            raise UserError(str(error).replace("rollout.prompts", "sft.batch")) from None
        config, rows = loaded.config, Rows(loaded)
        held_rows = Rows(loaded, held_out=True) if config.sft.held_out else None
        config.steps = math.ceil(config.sft.epochs * len(rows.stream) / config.sft.batch)
        config.eval.every = int(held_rows is not None)  # for the record: whether a measurement comes at the end
        setup = Tuning(config, loaded.model, loaded.mesh, loaded.text, rows.stream.mean_prompt_length)
        runs, packer = Runs([setup]), Packer(setup)
        learner = Learner(runs)
        held_out = HeldOut(setup, held_rows, packer, every=math.ceil(len(rows.stream) / config.sft.batch))
        record = stack.enter_context(Record(runs, workdir, [_folder(workdir, setup, rows, held_rows)]))
        record.resume(NothingDrawn(), learner)
        if record.unfinished:
            with record.hearing_signals(NothingDrawn(), learner):
                _loop(setup, rows, packer, learner, record, held_out)
                if config.checkpoint.export:
                    export(setup, learner.params, learner.frozen, workdir)
        elif hosts.is_writer():
            print(f"nothing to do: {workdir} has {record.start} of {config.steps} steps")
    if hosts.is_writer():
        first, last = first_and_last(read_scalars(workdir))
        losses = [f"{scalars['sft/loss']:.4g}" for scalars in (first, last)]
        print(f"loss {losses[0]} over the first 5 steps, {losses[1]} over the last 5\nlogs: {workdir}")


def _folder(workdir: Path, setup: Setup, rows: Rows, held_rows: Rows | None) -> RunFolder:
    sections = {"data": rows} | ({"sft.held_out": held_rows} if held_rows else {})
    own = identity(setup, {name: section.stream for name, section in sections.items()})
    same_everywhere(own)
    said = [f"{name}: {remark}" for name, section in sections.items() for remark in section.remarks]
    counts = {f"data/{kind}": count for kind, count in rows.counts.items()}
    return RunFolder(workdir, own, [*remarks(setup.config), *said], counts)


def _loop(setup: Setup, rows: Rows, packer: Packer, learner: Learner, record: Record, held_out: HeldOut) -> None:
    """Every step that is left to do, and the last measurement."""
    steps = setup.config.steps
    for step in range(record.start, steps):
        record.begin(step)
        with record.phases("evaluation"):
            scalars = held_out.at(step, learner)
        with record.phases("train"):
            began = time.perf_counter()
            batch, plan, tokens = packer(*rows.stream.batch(step))
            metrics = jax.device_get(learner.update(batch, plan, {}))
            seconds = time.perf_counter() - began
            record.look(step, learner)
        found = metrics_lib.summary(metrics)
        scalars |= {name: found[name] for name in ("sft/loss", "grad_norm", "update/skipped")}
        scalars |= {"sft/tokens": float(tokens), "train/occupancy": packing.occupancy(plan)}
        scalars["learning_rate"] = float(setup.learning_rate(step))
        record.tuned(step, scalars, plan, seconds)
        record.save_if_due(step + 1, NothingDrawn(), learner)
    record.finish([held_out.at(steps, learner)])


def main() -> None:
    workdir = dict(type=Path, required=True, metavar="DIR", help="logs and checkpoints; resumes what is there")
    flags = {"--workdir": workdir, **peers.FLAGS}
    config, arguments = cli.parse(__doc__.split("\n")[0], flags, first=peers.join)
    tune(config, arguments.workdir)


if __name__ == "__main__":
    peers.run_main(main)
