"""Tokens and operations that a step's chips do in a second."""

from collections.abc import Sequence

import jax
import numpy as np

from dppo_jax import packing
from dppo_jax.devices.chips import peak_of
from dppo_jax.models.flops import forward_flops, trained_flops
from dppo_jax.packing import Plan
from experiments.run.samples import Replies, Samples
from experiments.run.setup import Setup

TERA = 1e12


class Throughput:
    """Of one run. Operations are the model's (`models.flops`), of real tokens; a chip is what JAX calls a device."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._chips = 1 if setup.mesh is None else setup.mesh.size
        device = jax.devices()[0] if setup.mesh is None else setup.mesh.devices.flat[0]
        self._peak = peak_of(device.device_kind)

    def scalars(self, samples: Samples, own: Replies, plans: Sequence[Plan]) -> dict[str, float]:
        """By the log's tag, once a step is over. Rollout and update have no rates of their own where their clocks hold
        more or less than them, and there is no `throughput/mfu` where the chip's peak is not known."""
        c = self._setup.config
        whole, seconds = samples.whole_seconds(), samples.seconds()
        rollout, update = self.rollout_flops(own), self.update_flops(plans, own)
        flops = {"": (rollout + update + self.scored_flops(own)) / whole}
        if not (c.train.staleness or c.rollout.resample):
            flops |= {"rollout_": rollout / seconds["time/rollout"], "update_": update / seconds["time/train"]}
        tokens = float((1 + own.redrawn) * own.drawn.sum()) / whole
        found = {"tokens_per_s": tokens, "tokens_per_s_per_chip": tokens / self._chips}
        found |= {f"{part}tflops_per_chip": value / self._chips / TERA for part, value in flops.items()}
        if self._peak:
            found["mfu"] = flops[""] / self._chips / self._peak
        return {f"throughput/{name}": value for name, value in found.items()}

    def tuned(self, plan: Plan, seconds: float) -> dict[str, float]:
        """Of a step that draws nothing."""
        flops = self.update_flops([plan]) / self._chips / seconds
        tokens = float(np.sum(plan.responses_per_row)) / seconds
        found = {"tokens_per_s": tokens, "tokens_per_s_per_chip": tokens / self._chips, "tflops_per_chip": flops / TERA}
        if self._peak:
            found["mfu"] = flops / self._peak
        return {f"throughput/{name}": value for name, value in found.items()}

    def rollout_flops(self, own: Replies) -> float:
        """Of the prompts, once each, and of all tokens that decode steps took further, each as the mean one of the
        step's batch: with rows in flight or drawn anew these are others than the batch's."""
        model, prompts = self._setup.model, own.prompt_lengths
        first: np.ndarray = np.repeat(prompts, len(own.lengths) // len(prompts))
        passed = np.maximum(own.lengths - 1, 0)  # nothing follows the last one
        of_prompts = (1 + own.redrawn) * forward_flops(model, 0, prompts, len(prompts))
        of_responses = forward_flops(model, first, first + passed, float(np.maximum(own.drawn - 1, 0).sum()))
        told = float((own.lengths - own.drawn).sum())  # by environments
        decoded = passed.sum() if own.live is None else own.live + told
        return of_prompts + of_responses * float(decoded) / max(float(passed.sum()), 1.0)

    def update_flops(self, plans: Sequence[Plan], own: Replies | None = None) -> float:
        """Of the optimizer steps, with the further passes that some of them make: of the behavior policy, of a
        critic, whose prompts may be its own."""
        total = 0.0
        for plan in plans:
            lengths = packing.sample_lengths(plan)
            predicted = float(np.sum(plan.responses_per_row))
            total += trained_flops(self._setup.trained_model, lengths, predicted)
            if self._setup.needs_exact:
                total += forward_flops(self._setup.model, 0, lengths, predicted)
            if self._setup.advantages is None and own is not None:
                more = _by_row(own.critic_prompt_lengths - own.prompt_lengths, own)[plan.batch_rows]
                total += trained_flops(self._setup.model, lengths + np.where(lengths > 0, more, 0), 0)
        return total

    def scored_flops(self, own: Replies) -> float:
        """Of the passes over the whole batch before the updates: other policies, the teacher, a critic."""
        setup, predicted = self._setup, float(own.lengths.sum())
        whole = _by_row(own.prompt_lengths, own) + own.lengths
        total = sum(
            forward_flops(setup.model, 0, whole, predicted)
            for name in ("proximal_logp", "reference_logp")
            if name in setup.needed
        )
        if "teacher_logp" in setup.needed and setup.teacher is not None:
            total += forward_flops(setup.teacher.model, 0, whole, predicted)
        if setup.advantages is None:
            total += forward_flops(setup.model, 0, _by_row(own.critic_prompt_lengths, own) + own.lengths, 0)
        return total


def _by_row(of_prompts: np.ndarray, own: Replies) -> np.ndarray:
    """Of the prompt of every response, i[B], from i[N]."""
    return np.repeat(of_prompts, len(own.lengths) // len(of_prompts))
