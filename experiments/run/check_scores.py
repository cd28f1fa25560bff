"""What is refused of a reward model, of rows without answers, of a reward that falls by a KL, and of the best step."""

from ml_collections import ConfigDict

from configs import base
from dppo_jax.data.examples import UNSCORED
from dppo_jax.errors import UserError, lookup
from dppo_jax.losses import ESTIMATORS, required_fields
from dppo_jax.models import DTYPES
from experiments.run.ranges import shown
from experiments.run.setup import Setup


def check_scores(c: ConfigDict, setup: Setup) -> None:
    """UserError, one sentence."""
    _check_model(c)
    _check_teacher(c)
    _check_kl(c)
    _check_unscored(c, setup)


def _check_model(c: ConfigDict) -> None:
    model, defaults, weight = c.reward.model, base.get_config().reward.model, c.reward.terms.get("model")
    lookup(DTYPES, model.dtype, "reward.model.dtype")
    if weight and not model.path:
        raise UserError(
            f"reward.terms.model = {weight:g} needs a reward model: set reward.model.path to a Hugging Face directory, "
            "or a name on the hub"
        )
    for key, default in defaults.items():
        if not weight and model[key] != default:
            raise UserError(
                f"reward.model.{key} = {shown(model[key])} is of reward.terms.model, whose weight is 0: set "
                "reward.terms.model"
            )


def _check_teacher(c: ConfigDict) -> None:
    """UserError for settings of a teacher that there is none of."""
    for key, default in base.get_config().teacher.items():
        if not c.teacher.path and c.teacher[key] != default:
            raise UserError(f"teacher.{key} = {shown(c.teacher[key])} is of teacher.path, which is empty: set it")


def _check_kl(c: ConfigDict) -> None:
    r = c.reward
    lookup(ESTIMATORS, r.kl_estimator, "reward.kl_estimator")
    if not r.kl_coef and r.kl_estimator != (default := base.get_config().reward.kl_estimator):
        raise UserError(
            f"reward.kl_estimator = {shown(r.kl_estimator)} is of reward.kl_coef, which is 0: set it, or "
            f"reward.kl_estimator={default}"
        )
    for key, on in (("advantage.drop_equal", c.advantage.drop_equal), ("rollout.resample", c.rollout.resample)):
        if r.kl_coef and on:
            raise UserError(
                f"{key} is for groups of equal rewards, of which reward.kl_coef = {r.kl_coef:g} leaves none: set one "
                "of them to 0"
            )


def _check_unscored(c: ConfigDict, setup: Setup) -> None:
    """Rows without answers."""
    for name, data in (("data", c.data), *((f"eval.sets.{name}", data) for name, data in c.eval.sets.items())):
        if data.verifier != UNSCORED:
            continue
        if name != "data":
            raise UserError(f"{name}.verifier = {UNSCORED!r} scores nothing, and its scores are all an evaluation has")
        if c.reward.terms.get("correct") and not c.reward.function and required_fields(setup.loss, ("advantages",)):
            raise UserError(
                f"data.verifier = {UNSCORED!r} scores nothing, but reward.terms.correct = {c.reward.terms.correct:g} "
                f"weighs its score, and loss {c.loss.name!r} learns from it: set reward.terms.correct=0.0 and weigh "
                "another term, or set reward.function, or loss.name=distill"
            )
        for key, on in (("advantage.drop_equal", c.advantage.drop_equal), ("rollout.resample", c.rollout.resample)):
            if on and not c.reward.function and set(setup.terms) <= {"correct"}:
                raise UserError(f"{key} leaves out groups of equal rewards, which all are with data.verifier = 'none'")
        read = {"columns.answer": data.columns.answer, "answer_from": data.answer_from}
        read |= {"bad_label": "" if data.bad_label == "error" else data.bad_label}
        read |= {"extract": "" if data.extract == "auto" else data.extract}
        for key, set_to in read.items():
            if set_to:
                raise UserError(
                    f"data.verifier = {UNSCORED!r} reads no answers, but data.{key} = {shown(set_to)}: clear it"
                )


def check_best(c: ConfigDict) -> None:
    """UserError where checkpoint.best is of an evaluation that does not come."""
    kind, _, rest = c.checkpoint.best.partition("/")
    if kind != "eval":
        return
    lookup(c.eval.sets, rest.partition("/")[0], f"set of eval.sets in checkpoint.best = {shown(c.checkpoint.best)}:")
    if not c.eval.every:
        raise UserError(f"checkpoint.best = {shown(c.checkpoint.best)} is of an evaluation: set eval.every above 0")
