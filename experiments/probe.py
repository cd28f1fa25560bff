"""One batch of a config, looked at token by token: what experiments ask beside training."""

import contextlib
import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dppo_jax import packing
from dppo_jax.data.prompts import decode_replies
from dppo_jax.errors import UserError
from dppo_jax.evaluate import all_failed
from dppo_jax.models.decoder import Params
from dppo_jax.models.hf import load_params
from dppo_jax.packing import PackShape
from dppo_jax.rewards import shaping
from dppo_jax.sampling import step_key
from dppo_jax.train_step import assemble, jit_update
from dppo_jax.types import RolloutBatch, SlopeSums, TrainBatch
from experiments.run.load import load_prompts, load_setup
from experiments.run.rollouts import training_rollout, whole_batch_rollout
from experiments.run.setup import ROLLOUT, Setup


class Measured(NamedTuple):
    """The policy at every response token [B, R], its top-K log-probabilities [B, R, K], and the exact divergences."""

    logp: np.ndarray
    topk_logp: np.ndarray | None
    tv: np.ndarray
    kl: np.ndarray
    slope: SlopeSums | None = None  # of the exact divergences [B, R]
    vocabulary: int | None = None


class Probe:
    """A config's policy, data and devices, as training sets them up. Use it in a `with`.

    `topk`: K, tokens recorded, all of them where the vocabulary has fewer; `entropy`: the behavior policy's is, too.
    """

    def __init__(self, config: ConfigDict, topk: int = 0, entropy: bool = False):
        self._stack = contextlib.ExitStack()
        setup = load_setup(config, self._stack)
        self.config = config = setup.config
        if config.data.kind == "environment":
            raise UserError("data.kind = 'environment': a probe draws one turn, and scores it; take another data.kind")
        self.stream, self._scorer = load_prompts(setup, config.data, config.rollout.prompts, self._stack)
        for remark in self.stream.remarks:
            print(f"data: {remark}", file=sys.stderr)
        self.setup = setup = dataclasses.replace(setup, mean_prompt=self.stream.mean_prompt_length)
        recorded: dict[str, Any] = dict(topk=min(topk, setup.model.vocab_size), entropy=entropy)
        self.rollout = training_rollout(setup, **recorded)
        self._generate = setup.on_mesh(whole_batch_rollout(setup, **recorded))
        self._assemble = jax.jit(assemble, out_shardings=setup.by_row)
        if setup.advantages is None:
            raise UserError("advantage.name = gae needs a critic, which a probe has not; take advantage.name=reward")
        self._advantages = setup.advantages
        if config.lora.rank:
            raise UserError("lora.rank: a probe looks at whole policies; set lora.rank=0")
        self._params = load_params(setup.directory)[1]

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def state(self):
        """A fresh training state."""
        return self.setup.init_state(self._params)

    def generate(self, params: Params, step: int = 0) -> RolloutBatch:
        """The rollout of a step, on the devices."""
        return self._generate(params, self.stream.batch(step)[0], step_key(self.config.seed, step, ROLLOUT))

    def draw(self, params: Params, step: int = 0) -> tuple[TrainBatch, np.ndarray, np.ndarray]:
        """The batch of a step with its advantages, its response lengths [B], and the lengths of its prompts [B]."""
        (prompts, examples), rollout = self.stream.batch(step), self.generate(params, step)
        tokens, mask = jax.device_get((rollout.tokens, rollout.response_mask))
        text = self.setup.text
        replies = decode_replies(text.tokenizer, tokens, mask, text.eos_ids)
        group = self.config.rollout.group_size
        rewards, verifier = self._scorer.submit(replies, [e for e in examples for _ in range(group)]).result()
        if fault := all_failed(verifier, len(replies)):
            print(f"step {step}: {fault}", file=sys.stderr)
        responses = shaping.Responses(replies, mask.sum(axis=1, dtype=np.int32), rewards)
        terms, _ = shaping.values(responses, self.setup.terms, self.setup.term_settings)
        rewards = shaping.total(terms, self.setup.terms, len(replies))
        batch = self._assemble(prompts, rollout)
        batch = batch.replace(advantages=self._advantages(jnp.asarray(rewards), rollout.group))
        return batch, mask.sum(axis=1), np.repeat(prompts.mask.sum(axis=1), group)

    def plan(self, index: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, pack_shape: PackShape | None = None):
        """Where the rows of a minibatch go."""
        pack_shape = self.setup.pack_shape if pack_shape is None else pack_shape
        return packing.plan(index, prompts, lengths, pack_shape, packed=self.config.train.pack)

    def see(
        self,
        params: Params,
        behavior: Params,
        batch: TrainBatch,
        lengths: np.ndarray,
        prompts: np.ndarray,
        pack_shape: PackShape | None = None,
        training: Setup | None = None,
    ) -> Measured:
        """The policy at `params` on a batch that `behavior` drew, and its exact distance from there. `training`: whose
        pass it is (None: this probe's own setup)."""
        pack_shape = self.setup.pack_shape if pack_shape is None else pack_shape
        plan = self.plan(np.arange(len(lengths)), lengths, prompts, pack_shape)
        see = self._see(pack_shape, self.setup if training is None else training)
        seen = Measured(*jax.device_get(see(params, behavior, batch, plan)))
        return seen._replace(vocabulary=self.setup.model.vocab_size)

    @functools.cache  # noqa: B019  one probe a process
    def _see(self, pack_shape: PackShape, training: Setup):
        policy_logprobs = training.policy_logprobs_of(pack_shape)
        behavior_forward = self.setup.behavior_forward_of(pack_shape)

        def see(params, behavior, batch, plan):
            zero = jnp.zeros(batch.tokens.shape, jnp.float32)
            topk_zeros = None if batch.topk_ids is None else jnp.zeros(batch.topk_ids.shape, jnp.float32)
            shapes = (zero, topk_zeros, zero, zero, SlopeSums(*[zero] * 4))

            def fill_in(number, filled):
                microbatch = packing.microbatch(plan, number)
                packed = packing.pack(batch, zero, microbatch)
                behavior_head = behavior_forward(behavior, packed)
                head = policy_logprobs(params, packed, behavior_head=behavior_head, slope_sums=True)
                values = head.logp, head.ids_logp, head.exact.tv, head.exact.kl, head.exact.slope
                return jax.tree.map(lambda x, into: packing.unpack(batch, microbatch, x, into), values, filled)

            return jax.lax.fori_loop(0, plan.num_microbatches, fill_in, shapes)

        return jax.jit(see)

    def update(self):
        """The compiled update of this config, its state donated."""
        return jit_update(self.setup.update, self.setup.shardings, self.setup.mesh)


if __name__ == "__main__":
    raise SystemExit("error: experiments.probe is no command; the questions in experiments/questions use it")
