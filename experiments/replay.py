"""Runs an update again that a run skipped, and says which layer and which tokens made it not finite.

    python -m experiments.replay runs/a/skipped/12_2
    python -m experiments.replay runs/a/skipped/12_2 --config mine.py      # whose loss is in the run's config file

A run keeps the minibatch and the parameters of such an update (docs/collapse.md). Printed are, of every microbatch, the
norm of the gradient and how many of its entries are not finite, layer by layer; then the tokens that did it, found by
taking the gradient of one row at a time, and of ever shorter beginnings of its response. Where all is finite here, that
is said in one sentence, with exit status 2.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dppo_jax import packing
from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path, is_file, local_file
from dppo_jax.lora import joined
from dppo_jax.losses import LOSSES
from dppo_jax.models.hf import place_params
from dppo_jax.packing import PackShape, Plan
from dppo_jax.storage.run_config import read_config
from dppo_jax.train_step import TrainState, loss_inputs, minibatch_weights
from dppo_jax.types import TrainBatch
from experiments.run import cli
from experiments.run.load import load_setup
from experiments.run.setup import Setup
from experiments.run.skipped import FILE
from experiments.run.stored_config import stored_config
from experiments.sft import Tuning

MOST_SHOWN = 20  # rows


class Kept(NamedTuple):
    """What a run kept of an update, in NumPy; `about` has its step, number and the like."""

    about: dict[str, Any]
    params: dict[str, Any]
    behavior_params: dict[str, Any]
    batch: TrainBatch
    plan: Plan


class Token(NamedTuple):
    """The first token of a row's response with which the row's gradient is not finite."""

    row: int
    position: int
    text: str
    before: str  # the row's text up to there
    numbers: dict[str, float]


def read_kept(folder: Path) -> Kept:
    """UserError where the folder holds no update that was skipped."""
    path = folder / FILE
    if not is_file(path):
        raise UserError(f"{folder} holds no {FILE}: name what a run says it kept, such as runs/a/skipped/12_2")
    tree: dict[str, Any] = {"params": {}, "behavior_params": {}}
    try:
        with local_file(path) as local, safe_open(local, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                *parents, last = name.split("/")
                at = tree
                for parent in parents:
                    at = at.setdefault(parent, {})
                at[last] = file.get_tensor(name)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an update that was skipped: {error}") from None
    plan = Plan(**tree["plan"], shape=PackShape(*about["shape"]))
    return Kept(about, tree["params"], tree["behavior_params"], TrainBatch(**tree["batch"]), plan)


class Replay:
    """The gradient of a kept update, whole and in parts."""

    def __init__(self, kept: Kept, setup: Setup):
        self._kept, self._setup = kept, setup
        places = None if setup.mesh is None else setup.shardings.params
        frozen = {}
        if setup.config.lora.rank:
            frozen = setup.frozen_part(place_params(setup.directory, setup.model_shardings)[1])
        self._state = TrainState(
            jax.device_put(kept.params, places), (), jnp.int32(kept.about["updates"]), frozen
        )
        self._behavior = jax.device_put(kept.behavior_params, places) if kept.behavior_params else None
        self._weights = np.asarray(jax.jit(lambda b, p: minibatch_weights(setup.weights, b, p))(kept.batch, kept.plan))
        self._one_row = kept.plan.shape._replace(rows=setup.batch_shards)
        self._compiled = {shape: self._compile(shape) for shape in (kept.plan.shape, self._one_row)}
        self._see = jax.jit(self._numbers)

    def _compile(self, shape: PackShape):
        gradient = self._setup.gradient_of(shape)

        def measure(state, batch, plan, weights, number, behavior):
            grads, _ = gradient(state, batch, plan, weights, number, behavior)
            return entries(grads)

        return jax.jit(measure)

    def microbatch(self, number: int) -> dict[str, np.ndarray]:
        """Of one microbatch, by part of the model: see `entries`."""
        plan = self._kept.plan
        measure = self._compiled[plan.shape]
        return jax.device_get(measure(self._state, self._kept.batch, plan, self._weights, number, self._behavior))

    def rows(self, number: int) -> list[int]:
        """The samples of a microbatch, by number in the plan."""
        plan = self._kept.plan
        return np.flatnonzero(plan.rows // plan.shape.rows == number).tolist()

    def token(self, sample: int) -> Token | None:
        """The first token with which the sample's own gradient is not finite; None where it is finite."""
        kept, row = self._kept, int(self._kept.plan.batch_rows[sample])
        prompt = int(kept.batch.prompt_mask[row].sum())
        least, most = 0, int(packing.sample_lengths(kept.plan)[sample]) - prompt
        if self._is_finite(sample, most):
            return None
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self._is_finite(sample, middle) else (least, middle)
        return self._described(sample, row, prompt, most - 1)

    def _is_finite(self, sample: int, length: int) -> bool:
        """Whether the gradient is, of the sample's first `length` response tokens alone."""
        kept, plan, weights = self._kept, *self._alone(sample, length)
        found = self._compiled[self._one_row](self._state, kept.batch, plan, weights, 0, self._behavior)
        return sound(jax.device_get(found))

    def _alone(self, sample: int, length: int) -> tuple[Plan, np.ndarray]:
        batch, row = self._kept.batch, self._kept.plan.batch_rows[sample : sample + 1]
        lengths: np.ndarray = np.zeros(len(batch.tokens), np.int32)
        lengths[row] = length
        plan = packing.plan(row, batch.prompt_mask.sum(axis=1), lengths, self._one_row)
        return plan, self._weights[sample : sample + 1]

    def _described(self, sample: int, row: int, prompt: int, position: int) -> Token:
        batch = self._kept.batch
        plan, weights = self._alone(sample, position + 1)
        found = jax.device_get(self._see(self._state, batch, plan, weights, self._behavior))
        ids = [*batch.prompt_tokens[row][batch.prompt_mask[row]].tolist(), *batch.tokens[row, :position].tolist()]
        decode = self._setup.text.tokenizer.decode
        numbers = {name: float(values[row, position]) for name, values in found.items()}
        return Token(row, position, decode([int(batch.tokens[row, position])]), decode(ids)[-60:], numbers)

    def _numbers(self, state: TrainState, batch: TrainBatch, plan: Plan, weights: Any, behavior: Any) -> dict[str, Any]:
        """Of a plan of one microbatch, what a loss sees and gives, each [B, R]."""
        setup, params = self._setup, joined(state.frozen, state.params)
        places = packing.microbatch(plan, 0)
        packed = packing.pack(batch, weights, places)
        extras: dict[str, Any] = {}
        if setup.needs_exact:
            head = setup.behavior_forward_of(self._one_row)(joined(state.frozen, behavior), packed)
            extras = {"behavior_head": head, "slope_sums": "exact.slope" in setup.needed}
        inputs = loss_inputs(packed, setup.policy_logprobs_of(self._one_row)(params, packed, **extras))
        values = {
            "log-probability": inputs.logp,
            "behavior log-probability": inputs.behavior_logp,
            "advantage": inputs.advantages,
            "weight": packed.weights,
            "coefficient": setup.loss(inputs).coef,
        }
        empty = jnp.zeros(batch.tokens.shape, jnp.float32)
        return {name: packing.unpack(batch, places, value, empty) for name, value in values.items()}


def entries(grads: Mapping[str, Any]) -> dict[str, jax.Array]:
    """By part of the model: (squared norm of the finite entries, number of the others, number of all), f32[..., 3]; of
    the layers [L, 3], with a name such as layers/q."""

    def count(x: jax.Array, by_layer: bool) -> jax.Array:
        x = x.reshape(x.shape[0] if by_layer else 1, -1).astype(jnp.float32)
        finite = jnp.isfinite(x)
        square = jnp.sum(jnp.square(jnp.where(finite, x, 0.0)), axis=1)
        found = jnp.stack([square, jnp.sum(~finite, axis=1), jnp.full(len(x), x.shape[1])], axis=1)
        return found if by_layer else found[0]

    leaves = jax.tree_util.tree_flatten_with_path(grads)[0]
    names = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    return {name: count(leaf, name.startswith("layers/")) for name, leaf in names}


def sound(found: Mapping[str, np.ndarray]) -> bool:
    """Whether a gradient is finite, and its squared norm."""
    return all(np.isfinite(x[..., 0]).all() and not x[..., 1].any() for x in found.values())


def by_part(found: Mapping[str, np.ndarray]) -> dict[str, tuple[float, int, int, list[str]]]:
    """In the order of the forward pass: the norm of a part's finite entries, how many are not finite, of how many, and
    the names of the matrices that these are in."""
    layers = {name: x for name, x in found.items() if name.startswith("layers/")}
    of = {name: {name: x} for name, x in found.items() if name == "embed"}
    for layer in range(len(next(iter(layers.values()), ()))):
        of[f"layer {layer}"] = {name.removeprefix("layers/"): x[layer] for name, x in layers.items()}
    of |= {name: {name: x} for name, x in found.items() if name not in layers and name != "embed"}
    parts = {}
    for part, matrices in of.items():
        square, bad, size = np.sum([np.asarray(x).reshape(-1, 3).sum(axis=0) for x in matrices.values()], axis=0)
        where = [name for name, x in matrices.items() if np.asarray(x)[..., 1].any()]
        parts[part] = math.sqrt(square), int(bad), int(size), where
    return parts


def replay(folder: Path, config_file: str = "") -> str:
    """Prints what it finds, and returns it in one sentence; a config file, FILE or FILE:ARGUMENT, is run for the loss
    that it registers. UserError where the fault is not there again."""
    kept, config = read_kept(folder), stored_config(read_config(folder))
    if config_file:
        cli.run_config(*cli.file_and_argument(config_file))
    if config.loss.name not in LOSSES:
        name = config.loss.name
        raise UserError(f"no loss is called {name!r} here: name the config file that adds it, by --config FILE")
    with contextlib.ExitStack() as stack:
        setup = load_setup(config, stack, unread=("data", "reward.model", "teacher"))
        if kept.about["setup"] == Tuning.__name__:
            setup = Tuning(setup.config, setup.model, setup.mesh, setup.text)
        again = Replay(kept, setup)
        bad: dict[str, list[str]] = {}
        tokens: list[Token] = []
        norms = []
        for number in range(int(kept.plan.num_microbatches)):
            found = again.microbatch(number)
            print(f"microbatch {number}")
            for part, (norm, count, size, where) in by_part(found).items():
                inside = f", in {', '.join(where)}" if where else ""
                of_rest = "" if count == size else f", norm {'of the others ' if count else ''}{norm:.4g}"
                print(f"  {part:12} gradient: {count} of {size} entries not finite{inside}{of_rest}")
                norms.append(norm)
                if count or not math.isfinite(norm):
                    bad[part] = sorted({*bad.get(part, ()), *where})
            if not sound(found):
                tokens += [token for sample in again.rows(number) if (token := again.token(sample))]
        update = f"step {kept.about['step']}, update {kept.about['update']}"
        if not bad:
            raise UserError(
                f"{update}: the fault is not there again: all gradients are finite here, of norms up to "
                f"{max(norms):.4g}; take the machine and versions of the run, or look at the optimizer's numbers"
            )
    for token in tokens[:MOST_SHOWN]:
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in token.numbers.items())
        print(f"row {token.row}, position {token.position}: {token.text!r} after {token.before!r}: {numbers}")
    if len(tokens) > MOST_SHOWN:
        print(f"and {len(tokens) - MOST_SHOWN} more rows")
    return f"{update}: {_sentence(bad, tokens)}"


def _sentence(bad: Mapping[str, list[str]], tokens: list[Token]) -> str:
    *below, last = bad
    beside = f" (and so is that of {', '.join(below)}, which comes before it)" if below else ""
    matrices = f", in {', '.join(bad[last])}," if bad[last] else ""
    if not tokens:
        return f"the gradient of {last}{matrices} is not finite{beside}, but that of each row alone is"
    named = [f"row {token.row} at position {token.position} ({token.text!r})" for token in tokens[:3]]
    more = f" and {len(tokens) - 3} more rows" if len(tokens) > 3 else ""
    return f"the gradient of {last}{matrices} is not finite{beside}, because of {', '.join(named)}{more}"


def main() -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="what a run kept: WORKDIR/skipped/STEP_UPDATE")
    parser.add_argument("--config", default="", metavar="FILE", help="the run's, where that adds its loss to LOSSES")
    arguments = parser.parse_args()
    print(replay(arguments.folder, arguments.config))


if __name__ == "__main__":
    run_main(main)
