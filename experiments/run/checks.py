"""What is refused before anything is loaded or compiled: configs, models and meshes that cannot run."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from dppo_jax import precision, quantize
from dppo_jax.advantages import ADVANTAGES
from dppo_jax.critic import TARGETS
from dppo_jax.data.examples import UNSCORED
from dppo_jax.data.privileged import check_template
from dppo_jax.devices.sharding import check_divisible
from dppo_jax.errors import UserError, lookup
from dppo_jax.files import check_path, user_path
from dppo_jax.losses import ESTIMATORS, LOSSES, corrects_mismatch, hyperparameters, required_fields
from dppo_jax.models import DTYPES, ModelConfig
from dppo_jax.models.attention import KERNELS
from dppo_jax.models.config import MATRICES
from dppo_jax.models.decoder import REMAT, abstract_params, param_axes
from dppo_jax.models.pages import PAGE, count_for
from dppo_jax.rewards import own, shaping
from dppo_jax.rollout import check_stop
from dppo_jax.storage.checkpoint import BEST_OF
from dppo_jax.storage.loggers.wandb import check_project
from dppo_jax.weights import WEIGHTS
from experiments.run.check_data import check_data, data_sections, longest_response, value
from experiments.run.check_scores import check_best, check_scores
from experiments.run.ranges import INT32, ROWS, check_values, is_own, shown
from experiments.run.setup import Setup

# Names of jax.default_matmul_precision.
MATMUL = dict.fromkeys(("default", "high", "highest"))


def check(config: ConfigDict) -> None:
    """Refuses, before anything is loaded or compiled, what cannot run. UserError, one sentence."""
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is set, but rollouts and their keys are made for 32 bits: unset it")
    _check_sampling(config)
    check_values(config)
    _check_names(config)
    _check_paths(config)
    check_data(config)
    _check_sizes(config)
    setup = Setup(config)
    setup.learning_rate  # noqa: B018  refuses its settings
    _check_lora(config)
    _check_precision(config)
    _check_shadow_losses(config)
    _check_needed(config, setup.needed)
    _check_pages(config)
    check_stop(config.rollout.stop)
    _check_in_flight(config, setup.needed)
    if config.rollout.exact:
        _check_exact(config)
    _check_reward(config, setup)
    check_scores(config, setup)
    check_best(config)
    _check_learning(config, setup)
    _check_critic(config)
    if config.log.wandb:
        check_project(config.log.wandb)


def _check_sampling(c: ConfigDict) -> None:
    """What training may not do, in words of its own."""
    if _number(c, "rollout.top_p") and c.rollout.top_p != 1.0:
        raise UserError(
            f"rollout.top_p = {c.rollout.top_p}: nucleus sampling changes the behavior policy, so training "
            "refuses it; set rollout.top_p=1.0 (evaluation has eval.top_p)"
        )
    for key in ("rollout.temperature", "policy.temperature"):
        if _number(c, key) and not 0 < value(c, key) < float("inf"):
            raise UserError(f"{key} = {value(c, key)}: training samples, so it must be above 0")
    if _number(c, "train.staleness") and c.train.staleness > 1:
        raise UserError(f"train.staleness = {shown(c.train.staleness)}: a rollout may be 1 step old, or 0")


def _check_names(c: ConfigDict) -> None:
    for key in ("policy.dtype", "rollout.dtype", "teacher.dtype"):
        lookup(DTYPES, value(c, key), key)
    if c.checkpoint.export_dtype:
        lookup(DTYPES, c.checkpoint.export_dtype, "checkpoint.export_dtype")
    if c.policy.dtype == "float16":
        raise UserError("policy.dtype float16 would lose small gradients without loss scaling; use bfloat16 or float32")
    lookup(BEST_OF, c.checkpoint.best_of, "checkpoint.best_of")
    lookup(REMAT, c.policy.remat, "policy.remat")
    lookup(MATMUL, c.policy.matmul, "policy.matmul")
    lookup({"auto": None, **KERNELS}, c.policy.attention, "policy.attention")
    lookup(dict.fromkeys(("auto", "pages", "blocks")), c.rollout.cache, "rollout.cache")
    lookup(WEIGHTS, c.aggregation.name, "aggregation.name")
    lookup(ESTIMATORS, c.reference.estimator, "reference.estimator")
    lookup({**ADVANTAGES, "gae": None}, c.advantage.name, "advantage.name")
    lookup(TARGETS, c.critic.targets, "critic.targets")


def _check_paths(c: ConfigDict) -> None:
    """The folders and files that a config names can be asked for. Whether they are there is found where they are."""
    of_data = {"sft.held_out", *(f"{name}.path" for name in data_sections(c))}
    for key in ("policy.path", "policy.shape", "reward.model.path", "teacher.path", *sorted(of_data)):
        user_path(value(c, key), key, reach=False, pattern=key in of_data)
    for key in ("compile_cache", "label_cache"):
        text = check_path(value(c, key), key)  # of other faults those who use it only warn
        if key == "label_cache" and "://" in text:
            raise UserError(f"label_cache = {text!r:.200} must be on a disk of this machine, not in a bucket")


def _check_sizes(c: ConfigDict) -> None:
    if c.rollout.prompts % c.train.minibatches:
        raise UserError(
            f"rollout.prompts = {c.rollout.prompts} is not divisible by train.minibatches = {c.train.minibatches}"
        )
    for keys in (("rollout.prompts", "rollout.group_size"), ("eval.prompts", "eval.samples")):
        _check_product(c, keys, ROWS, "rows")
    _check_product(c, ("steps", "train.epochs", "train.minibatches"), INT32, "updates")
    if c.reward.overlong_buffer > c.rollout.max_new_tokens:
        raise UserError(
            f"reward.overlong_buffer = {c.reward.overlong_buffer} is longer than a response, "
            f"rollout.max_new_tokens = {c.rollout.max_new_tokens}: every reward would be lowered"
        )


def _check_product(c: ConfigDict, keys: tuple[str, ...], most: int, unit: str) -> None:
    count = math.prod(value(c, key) for key in keys)
    if count > most:
        raise UserError(f"{' x '.join(keys)} = {count:,} {unit}, more than the {most:,} that can be counted")


def _check_lora(c: ConfigDict) -> None:
    for name in c.lora.targets:
        lookup(dict.fromkeys(MATRICES), name, "lora.targets")
    if c.lora.rank and not c.lora.targets:
        raise UserError(f"lora.targets = {tuple(c.lora.targets)} must name at least one matrix")


def _check_precision(c: ConfigDict) -> None:
    """The rollout's arithmetic."""
    precision.weights(c.rollout.weights)
    precision.activations(c.rollout.activations)
    lookup({"": None, **quantize.FORMATS}, c.rollout.quantize, "rollout.quantize")
    for key in ("rollout.weights", "rollout.activations"):
        if c.rollout.quantize and value(c, key):
            raise UserError(f"rollout.quantize = {c.rollout.quantize} and {key} both narrow the rollout: unset one")
    if c.rollout.quantize_activations and not c.rollout.quantize:
        raise UserError("rollout.quantize_activations needs a format: set rollout.quantize to int8 or float8")


def _check_needed(c: ConfigDict, needed: frozenset[str]) -> None:
    """What the loss and the shadow losses need, and which other settings would take it away."""
    if "teacher_logp" in needed and not c.teacher.path:
        raise UserError(
            f"loss {_with_teacher(c)!r} needs a teacher: set teacher.path to a Hugging Face model directory, or a name "
            "on the hub, with the policy's own tokenizer"
        )
    if c.train.staleness and "proximal_logp" in needed:
        raise UserError(
            f"loss {c.loss.name!r} needs the policy at the rollout's parameters, which train.staleness = 1 no longer "
            "has; set train.staleness=0"
        )
    if c.train.staleness and "exact" in needed:
        raise UserError(
            "exact divergences need the rollout's parameters, which train.staleness = 1 no longer has; set "
            "train.staleness=0"
        )
    if c.train.staleness and c.rollout.resample:
        raise UserError(
            "rollout.resample draws from the parameters of its step, which train.staleness = 1 no longer has; set "
            "train.staleness=0"
        )
    if c.train.staleness and c.rollout.lag:
        raise UserError("train.staleness and rollout.lag both age the behavior parameters: set one of them to 0")
    if "topk" in needed and c.rollout.tracked < 1:
        raise UserError(f"loss {c.loss.name!r} needs tracked tokens: set rollout.tracked to at least 1")
    if c.alp.sigma and not c.optimizer.learning_rate:
        raise UserError("alp.sigma needs an optimizer.learning_rate above 0: alp.learning_rate follows its schedule")
    if c.alp.sigma and corrects_mismatch(LOSSES[c.loss.name]):
        raise UserError(
            f"loss {c.loss.name!r} corrects the mismatch by the proximal policy, and alp.sigma = {c.alp.sigma} by its "
            "perturbation: set alp.sigma=0, or loss.name=ppo_clip"
        )


def _with_teacher(c: ConfigDict) -> str:
    """Of the loss and the shadow losses the first that asks for a teacher."""
    setup = Setup(c)
    losses = {c.loss.name: setup.loss, **setup.shadow_losses}
    return next(name for name, loss in losses.items() if required_fields(loss, ("teacher_logp",)))


def _check_pages(c: ConfigDict) -> None:
    r = c.rollout
    if r.pages and r.cache == "blocks":
        raise UserError(f"rollout.pages = {r.pages}, but rollout.cache = 'blocks' has none; set rollout.cache=pages")
    for name, data in data_sections(c).items() if r.pages else ():
        key = longest_response(c, name)
        least = count_for(data.max_prompt_len + value(c, key) - 1)
        if r.pages < least:
            raise UserError(
                f"rollout.pages = {r.pages} is less than one row may need: {name}.max_prompt_len + {key} = "
                f"{data.max_prompt_len} + {value(c, key)} tokens take {least} pages of {PAGE}"
            )


def _check_in_flight(c: ConfigDict, needed: frozenset[str]) -> None:
    """Rows that are drawn over several steps."""
    r = c.rollout
    if not r.in_flight:
        if r.max_age is not None:
            raise UserError(f"rollout.max_age = {r.max_age} is of rows in flight: set rollout.in_flight to at least 1")
        return
    if r.max_age is not None and r.max_age < r.in_flight:
        raise UserError(
            f"rollout.max_age = {r.max_age} is below rollout.in_flight = {r.in_flight}: a group that is drawn so many "
            "steps ahead waits as many for its turn"
        )
    rows = (r.in_flight + 1) * r.prompts * r.group_size
    if rows > ROWS:
        raise UserError(
            f"rollout.in_flight = {r.in_flight} keeps {rows:,} rows, more than the {ROWS:,} that can be counted"
        )
    several = "rollout.in_flight draws a batch from several steps' parameters"
    if "exact" in needed:
        raise UserError(f"exact divergences need those of every token, and {several}; set rollout.in_flight=0")
    for key in ("train.staleness", "rollout.lag"):
        if value(c, key):
            raise UserError(f"{key} and rollout.in_flight both age the behavior parameters: set one of them to 0")
    if r.resample:
        raise UserError(f"rollout.resample draws whole batches, and {several}; set one of them to 0")
    if r.router_replay:
        raise UserError(f"rollout.router_replay needs one set of experts a token, and {several}; set one of them off")


def _check_exact(c: ConfigDict) -> None:
    """What would part a rollout from the training pass that it is drawn from."""
    fixed = {
        "policy.dtype": "float32",
        "rollout.dtype": c.policy.dtype,
        "lora.rank": 0,
        "policy.temperature": c.rollout.temperature,
        "train.pack": False,
    }
    for key, needed in fixed.items():
        if value(c, key) not in (None, needed):
            why = ": where a response lies may not depend on the lengths of others" if key == "train.pack" else ""
            raise UserError(
                f"rollout.exact draws from the training pass, and {key} = {shown(value(c, key))} would be another "
                f"one{why}; set {key}={needed}"
            )
    narrower = ("rollout.weights", "rollout.activations", "rollout.quantize")
    older = ("rollout.lag", "rollout.in_flight", "train.staleness", "rollout.resample")
    for key in (*narrower, *older, "rollout.router_replay", "alp.sigma"):
        if value(c, key):
            raise UserError(
                f"rollout.exact draws from the training pass at equal parameters, which {key} = "
                f"{shown(value(c, key))} parts from the rollout; unset one of them"
            )
    if c.data.kind == "environment":
        raise UserError("rollout.exact draws whole responses, not turns with an environment; set rollout.exact=False")


def _check_shadow_losses(c: ConfigDict) -> None:
    for name in c.log.regions:
        numbers = c.loss_defaults[name] if name in c.loss_defaults else {}
        if missing := sorted(hyperparameters(lookup(LOSSES, name, "loss in log.regions")) - set(numbers)):
            raise UserError(f"log.regions: {name!r} needs loss_defaults.{name}.{missing[0]}, which nothing sets")


def _check_learning(c: ConfigDict, setup: Setup) -> None:
    """Refuses configs whose every update is 0, or that learn the wrong thing."""
    group = setup.advantages
    if group is not None:
        batch = jax.ShapeDtypeStruct((c.rollout.prompts * c.rollout.group_size,), jnp.float32)
        jax.eval_shape(group, batch, jax.ShapeDtypeStruct(batch.shape, jnp.int32))
    if c.advantage.ddof and "ddof" not in getattr(group, "keywords", {}):
        raise UserError(
            f"advantage.ddof = {c.advantage.ddof} is for the standard deviations of group_mean_std and batch_norm, and "
            f"advantage.name = {c.advantage.name} has none; set advantage.ddof=0"
        )
    if c.advantage.name == "max_rl":
        _check_binary(c, setup)
    for key in ("advantage.drop_equal", "rollout.resample"):
        if value(c, key) and c.rollout.group_size == 1:
            raise UserError(f"{key} leaves out groups of equal rewards, which all are with rollout.group_size = 1")
    tokens = c.rollout.prompts * c.rollout.group_size * c.rollout.max_new_tokens
    if c.advantage.name == "gae" and c.critic.whiten and tokens == 1:
        raise UserError("critic.whiten: of a batch of one token nothing is left to learn; set critic.whiten=False")
    if c.optimizer.clip_norm == 0:
        raise UserError("optimizer.clip_norm = 0 would make every update 0; inf: never clipped")
    numbers = setup.hyperparameters
    if numbers.get("ratio_cap") == 0 and is_own(c.loss.name):
        raise UserError(f"ratio_cap = 0 of loss {c.loss.name!r} would make every update 0; set loss.ratio_cap above 0")
    low, high = numbers.get("correction_low", 0), numbers.get("correction_high", math.inf)
    if low > high and is_own(c.loss.name):
        raise UserError(f"loss.correction_low = {low} is above loss.correction_high = {high}: no token would be kept")


def _check_critic(c: ConfigDict) -> None:
    """What the critic sees beside the policy."""
    if c.critic.privileged:
        check_template(c.critic.template)
        return
    defaults = base.get_config().critic
    for key in ("template", "max_prompt_len"):
        if c.critic[key] != defaults[key]:
            raise UserError(f"critic.{key} = {shown(c.critic[key])} is of critic.privileged, which is empty: set it")


def _check_binary(c: ConfigDict, setup: Setup) -> None:
    """The reward of an advantage that is for 0 and 1. What reward.function gives is looked at when it is there."""
    made = "advantage.name = max_rl is for rewards of 0 and 1"
    if "length" in setup.terms:
        raise UserError(
            f"{made}, which reward.overlong_buffer lowers: set reward.overlong_buffer=0, or another advantage.name"
        )
    if c.reward.kl_coef:
        raise UserError(f"{made}, which reward.kl_coef lowers: set reward.kl_coef=0.0, or another advantage.name")
    other = next((name for name in setup.terms if name != "correct"), None)
    if other:
        raise UserError(
            f"{made}, to which reward.terms.{other} = {setup.terms[other]:g} adds: set reward.terms.{other}=0.0, or "
            "another advantage.name"
        )


def _check_reward(c: ConfigDict, setup: Setup) -> None:
    r, defaults = c.reward, base.get_config().reward
    shaping.compiled(r.format)
    if r.function:
        own.split(r.function)
        if c.data.extract != "auto":
            raise UserError(
                f"data.extract = {c.data.extract!r} is the verifier's, but reward.function is given the whole reply: "
                "set data.extract=auto"
            )
    if r.overlong_buffer and not r.terms.get("length"):
        raise UserError(
            f"reward.overlong_buffer = {r.overlong_buffer} is of reward.terms.length, whose weight is 0: set "
            "reward.terms.length=1.0"
        )
    if not r.overlong_buffer and r.terms.get("length") not in (None, 0, defaults.terms.length):
        raise UserError(f"reward.terms.length = {r.terms.length:g} weighs nothing: set reward.overlong_buffer")
    for key, term in (("format", "format"), ("ngram", "repetition")):
        if r[key] != defaults[key] and not r.terms.get(term):
            raise UserError(
                f"reward.{key} = {shown(r[key])} is of reward.terms.{term}, whose weight is 0: set reward.terms.{term}"
            )
    if not setup.terms:
        scored = c.data.verifier != UNSCORED or c.reward.function
        mend = "set reward.terms.correct=1.0" if scored else "weigh another term, such as reward.terms.model"
        raise UserError(f"reward.terms: every weight is 0, so every reward would be; {mend}")


def _number(config: ConfigDict, key: str) -> bool:
    """Whether a key is there and holds a number: what else it may not be, `check_values` says."""
    try:
        number = value(config, key)
    except (KeyError, AttributeError, TypeError):
        return False
    return isinstance(number, int | float)


def check_length(config: ConfigDict, model: ModelConfig) -> None:
    """Refuses prompts and responses that together are longer than the model's positions."""
    for name, data in data_sections(config).items():
        key = longest_response(config, name)
        if data.max_prompt_len + value(config, key) > model.longest_row:
            raise UserError(
                f"{name}.max_prompt_len + {key} = {data.max_prompt_len} + {value(config, key)} exceeds the model's "
                f"{model.longest_row} positions"
            )
    most = config.critic.max_prompt_len + config.rollout.max_new_tokens
    if config.critic.privileged and most > model.longest_row:
        raise UserError(
            f"critic.max_prompt_len + rollout.max_new_tokens = {most} exceeds the model's {model.longest_row} positions"
        )


def check_mesh(config: ConfigDict, mesh: Mesh, model: ModelConfig) -> None:
    """Refuses rows and parameters that do not divide over the mesh."""
    c = config
    counts = {"rollout.prompts": c.rollout.prompts, "rollout.slots": c.rollout.slots}
    if c.eval.every:
        counts["eval.prompts"] = c.eval.prompts
    check_divisible(mesh, counts, abstract_params(model), param_axes(model))
