"""The teacher of a distillation (loss distill): another model of the same tokens, which scores what the policy drew."""

import jax

from dppo_jax.errors import UserError
from dppo_jax.models.decoder import Params
from dppo_jax.models.hf import place_params
from dppo_jax.packing import Plan
from dppo_jax.teacher_forced import make_recompute
from dppo_jax.train_step import jit_finite
from dppo_jax.types import TrainBatch
from experiments.run.runs import Runs


class Teacher:
    """The teacher's parameters on the policy's mesh, one copy for all runs, and its pass over what they drew."""

    def __init__(self, runs: Runs):
        assert runs.base.teacher is not None, "checks refuses a loss that needs a teacher, where there is none"
        self._setup = runs.base.teacher
        score = make_recompute(self._setup.policy_logprobs_of(runs.base.pack_shape), "teacher")

        def score_all(params: Params, batch: TrainBatch, plan: Plan) -> TrainBatch:
            return runs.each(lambda batch, plan: score(params, batch, plan))(batch, plan)

        self._score = jax.jit(score_all, out_shardings=runs.base.by_row)
        self._params: Params = {}

    def load(self) -> None:
        """Reads the parameters, kept in teacher.dtype. UserError where one is not finite."""
        setup = self._setup
        self._params = place_params(setup.directory, setup.model_shardings, setup.config.policy.dtype)[1]
        if not jit_finite()(self._params):
            path = setup.config.policy.path
            raise UserError(f"the teacher in {path} has parameters that are not finite, or too large")

    def score(self, batch: TrainBatch, plan: Plan) -> TrainBatch:
        """The batch with the teacher's logp of every response token; `plan` of all its rows."""
        return self._score(self._params, batch, plan)
