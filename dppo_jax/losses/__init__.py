"""Policy losses: pure functions from `LossInputs` to the coefficient of grad log pi.

Every method is the same gradient with different parts (arXiv 2602.04879, equation 23, extended):

    grad J = E[ sum_t  w_t c_t grad log pi(a_t|s_t) ],    c_t = M_t min(r_t, C) A_t + e_t,    r_t = pi(a_t) / mu(a_t)

mu is the behavior policy, C = `ratio_cap` (inf: no truncation), and c_t carries no gradient. A loss chooses the mask M.
Upper thresholds (`*_high`) guard A > 0, lower ones (`*_low`) guard A < 0. Inequalities are strict: what equals its
threshold is kept, except where a row says otherwise.

To add a loss: write one function of (LossInputs, *, hyperparameters) that returns `from_keep(...)` or a `LossOutput`,
and put it into LOSSES. Its keyword-only arguments become the config keys `loss.<name>`: numbers, or one of a few words
where the annotation is a Literal. Bounds on the mismatch rho = pi'/mu are called `correction_*`, and tell that a loss
corrects it. `Sequences` gives sums over whole responses.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp

from dppo_jax.divergences import prob_diff
from dppo_jax.errors import UserError, lookup, nearest
from dppo_jax.losses import corrections, distillation, divergence, predictive, ratio, sequence
from dppo_jax.losses.core import (
    Bound,
    BoundLoss,
    Loss,
    MissingField,
    Sequences,
    from_keep,
    log_ratio,
    output,
    policy_objective,
    require,
    two_sided,
    zero_outside_mask,
)
from dppo_jax.losses.reference import ESTIMATORS, token_kl, with_reference_kl
from dppo_jax.types import ExactDivergence, LossInputs, LossOutput, SlopeSums, TopKPair

__all__ = [
    "ESTIMATORS",
    "LOSSES",
    "ExactDivergence",
    "LossInputs",
    "LossOutput",
    "Sequences",
    "SlopeSums",
    "TopKPair",
    "bind_loss",
    "from_keep",
    "log_ratio",
    "output",
    "policy_objective",
    "prob_diff",
    "require",
    "zero_outside_mask",
    "two_sided",
    "token_kl",
    "with_reference_kl",
]

LOSSES: dict[str, Loss] = {
    "reinforce": ratio.reinforce,
    "pg_is": ratio.truncated_is,
    "cispo": ratio.truncated_is,
    "ppo_clip": ratio.ratio_clip,
    "bypass": ratio.ratio_clip,
    "clip_higher": ratio.ratio_clip,
    "dual_clip": ratio.dual_clip,
    "minirl": ratio.minirl,
    "minirl_tis": ratio.minirl,
    "ppo_clip_recomputed": ratio.ratio_clip_recomputed,
    "token_tis": corrections.token_tis,
    "sequence_tis": corrections.sequence_tis,
    "token_mis": corrections.token_mis,
    "sequence_mis": corrections.sequence_mis,
    "icepop": corrections.icepop,
    "gspo": sequence.gspo,
    "sapo": ratio.sapo,
    "kimi_k25": ratio.kimi_k25,
    "deepseek_v32": sequence.deepseek_v32,
    "trm_max": sequence.trm_max,
    "trm_mean": sequence.trm_mean,
    "vaco": sequence.vaco,
    "dppo_binary_tv": divergence.dppo_binary_tv,
    "dppo_binary_kl": divergence.dppo_binary_kl,
    "dppo_topk_tv": divergence.dppo_topk_tv,
    "dppo_topk_kl": divergence.dppo_topk_kl,
    "dppo_exact_tv": functools.partial(divergence.dppo_exact, kind="tv"),
    "dppo_exact_kl": functools.partial(divergence.dppo_exact, kind="kl"),
    "pdm_topk_tv": functools.partial(predictive.pdm_topk, kind="tv"),
    "pdm_topk_kl": functools.partial(predictive.pdm_topk, kind="kl"),
    "pdm_exact_tv": functools.partial(predictive.pdm_exact, kind="tv"),
    "pdm_exact_kl": functools.partial(predictive.pdm_exact, kind="kl"),
    "dppo_binary_tv_proximal": functools.partial(divergence.dppo_binary_tv, proximal=True),
    "dppo_binary_kl_proximal": functools.partial(divergence.dppo_binary_kl, proximal=True),
    "dppo_topk_tv_proximal": functools.partial(divergence.dppo_topk_tv, proximal=True),
    "dppo_topk_kl_proximal": functools.partial(divergence.dppo_topk_kl, proximal=True),
    "binary_tv_unsigned": divergence.binary_tv_unsigned,
    "kpop": divergence.kpop,
    "drpo": divergence.drpo,
    "cppo": sequence.cppo,
    "minimal_mask": divergence.minimal_mask,
    "relax_low": functools.partial(ratio.relaxed_clip, low=True, high=False),
    "relax_high": functools.partial(ratio.relaxed_clip, low=False, high=True),
    "relax_both": functools.partial(ratio.relaxed_clip, low=True, high=True),
    "geometric_mask": sequence.geometric_mask,
    "flash_reinforce": sequence.flash_reinforce,
    "vespo": sequence.vespo,
    "gmpo": sequence.gmpo,
    "minpro": sequence.minpro,
    "m2po": sequence.m2po,
    "estr": ratio.estr,
    "dis": ratio.dis,
    "ripo": ratio.ripo,
    "aspo": ratio.aspo,
    "up": ratio.up,
    "prime_rl": divergence.prime_rl,
    "distill": distillation.distill,
}


def hyperparameters(loss: Loss) -> frozenset[str]:
    """The names a loss must be given: its keyword-only arguments without a default."""
    parameters = inspect.signature(loss).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def words(loss: Loss) -> dict[str, tuple[str, ...]]:
    """Its hyperparameters that are text, each with the words that it may be: those of its Literal annotation."""
    parameters, names = inspect.signature(loss).parameters, hyperparameters(loss)
    annotations = {name: parameters[name].annotation for name in names}
    return {name: get_args(kind) for name, kind in annotations.items() if get_origin(kind) is Literal}


def check_word(value: Any, known: Sequence[str], key: str) -> None:
    """UserError for a value of `key` that is none of the known words."""
    if not isinstance(value, str):
        raise UserError(f"{key} must be text, not {value!r}; known: {', '.join(sorted(known))}")
    lookup(dict.fromkeys(known), value, key)


def bind_loss(name: str, values: Mapping[str, float | str]) -> Bound:
    """The loss called `name` with its hyperparameters fixed to `values`, by name.

    UserError for an unknown loss, for a hyperparameter that is unknown or missing, and for an unknown word.
    """
    loss = lookup(LOSSES, name, "loss")
    names = hyperparameters(loss)
    for key in values:
        if key not in names:
            raise UserError(f"loss {name!r} has no hyperparameter {key!r}{nearest(key, names)}")
    if missing := sorted(names - set(values)):
        keys = ", ".join(f"loss.{key}" for key in missing)
        raise UserError(
            f"loss {name!r} needs {keys}, which nothing sets (in a sweep: loss_defaults.{name}.{missing[0]}); "
            f"its hyperparameters are {sorted(names)}"
        )
    for key, known in words(loss).items():
        check_word(values[key], known, f"loss.{key}")
    return Bound(loss, **values)


def corrects_mismatch(loss: Loss) -> bool:
    """Whether it corrects the mismatch rho = pi'/mu beside the ratio pi/pi', by bounds on it: `correction_*`."""
    return any(name.startswith("correction_") for name in hyperparameters(loss))


# Fields that cost something to have.
OPTIONAL = ("proximal_logp", "reference_logp", "teacher_logp", "behavior_entropy", "topk", "exact", "exact.slope")


def _without(inputs: Any, field: str) -> Any:
    """The same with None in a field (dots reach into it)."""
    name, _, inner = field.partition(".")
    return dataclasses.replace(inputs, **{name: _without(getattr(inputs, name), inner) if inner else None})


@functools.lru_cache(maxsize=1000)
def required_fields(loss: BoundLoss, among: tuple[str, ...] = OPTIONAL) -> frozenset[str]:
    """Which of some fields of LossInputs (dots reach into one) a bound loss needs, found by tracing it without each."""
    value, flag = jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    topk, count = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    full = LossInputs(
        logp=value,
        behavior_logp=value,
        advantages=value,
        mask=flag,
        segments=count,
        proximal_logp=value,
        reference_logp=value,
        teacher_logp=value,
        behavior_entropy=value,
        topk=TopKPair(logp=topk, behavior_logp=topk, has_sampled=flag, proximal_logp=topk, outside=count),
        exact=ExactDivergence(tv=value, kl=value, slope=SlopeSums(*[value] * 4)),
    )

    def needs(field: str) -> bool:
        try:
            jax.eval_shape(loss, _without(full, field))
        except (MissingField, TypeError, AttributeError):  # asked with `require`, or used as if it were there
            return True
        return False

    jax.eval_shape(loss, full)
    return frozenset(field for field in among if needs(field))


RENAMED = {"from_mask": "from_keep", "safe": "zero_outside_mask", "bind": "bind_loss"}


def __getattr__(name: str) -> None:
    """Says what has another name now."""
    if name in RENAMED:
        raise ImportError(f"dppo_jax.losses.{name} is called {RENAMED[name]} now")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
