"""What the tests of the rollout share: golden models, a compiled rollout, and what its numbers should be, in float64.

The golden models, their last norm scaled until the likeliest token has about half the mass. A rollout is compiled
once per set of options; which tokens end a response, and which one pads, are arguments of the compiled function here.
"""

import dataclasses
import functools

import jax
import numpy as np

from dppo_jax.models import load_policy
from dppo_jax.models.decoder import forward, head_weight
from dppo_jax.rollout import Rollout
from dppo_jax.types import PromptBatch, RolloutBatch
from tests.helpers.fixtures import COMPILER_OPTIONS
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
FAMILY = {0.5: "qwen3", 1.0: "llama", 1.7: "qwen2"}  # each temperature on another architecture; qwen2 is tied
SOFTCAP = {"qwen3": None, "llama": None, "qwen2": 8.0}
TEMPERATURES = list(FAMILY)
N, P, G, R, K, V = 4, 7, 3, 14, 5, 96
LENGTHS = np.array([7, 3, 1, 5])
TOLERANCE = 1e-4
NEVER = (-1, -1)  # no token ends a response
BLOCK = 16  # a draw of V tokens goes by blocks of this many


@functools.cache
def policy(family: str):
    loaded = load_policy(str(MODELS / family))
    config = dataclasses.replace(loaded.config, logit_softcap=SOFTCAP[family])
    return config, loaded.params | {"final_norm": 5 * loaded.params["final_norm"]}


def prompts(lengths=LENGTHS, order=None, limit=None, width: int = P) -> PromptBatch:
    """Ragged prompts, padded on the left with a token that also occurs in them; limits in the order of the prompts."""
    tokens = np.random.RandomState(0).randint(0, V, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width) >= width - lengths[:, None]
    tokens = np.where(mask, tokens, tokens[0, 0])
    order = np.arange(len(lengths)) if order is None else np.asarray(order)
    limit = None if limit is None else np.asarray(limit, np.int32)[order]
    return PromptBatch(tokens=tokens[order], mask=mask[order], group=order.astype(np.int32), limit=limit)


@functools.cache
def compiled(temperature: float, like: float, group_size: int = G, length: int = R, **options):
    """(params, prompts, key, eos_ids, pad_id) -> rollout."""
    config, _ = policy(FAMILY[like])
    # Every optimisation where the temperature is 1; elsewhere, a compilation that takes no longer than the run.
    quickly = None if (temperature, group_size, length, options) == (1.0, G, R, {}) else COMPILER_OPTIONS

    @functools.partial(jax.jit, compiler_options=quickly)
    def run(params, prompts, key, eos_ids, pad_id):
        return Rollout(
            config, group_size=group_size, max_new_tokens=length, temperature=temperature,
            eos_ids=tuple(eos_ids), pad_id=pad_id, **{"topk": K, "record_entropy": True} | options,
        )(params, prompts, key)  # fmt: skip

    return run


def rollout(temperature: float, eos_ids=NEVER, pad_id=0, *, batch=None, seed=0, like=None, **options) -> RolloutBatch:
    like = temperature if like is None else like
    params, batch = policy(FAMILY[like])[1], prompts() if batch is None else batch
    ends = np.full(N * G, -1, np.int32)  # one shape, however many tokens end a response
    ends[: len(eos_ids)] = eos_ids
    out = compiled(temperature, like, **options)(params, batch, jax.random.key(seed), ends, np.int32(pad_id))
    return jax.tree.map(np.asarray, out)


@functools.cache
def free(temperature: float, seed: int = 0) -> RolloutBatch:
    """Without an end: every row fills its length."""
    return rollout(temperature, seed=seed)


@functools.cache
def hidden_states(like: float, width: int):
    config, _ = policy(FAMILY[like])
    options = COMPILER_OPTIONS
    run = lambda params, tokens, mask: forward(config, params, tokens, mask)[:, width - 1 : -1]  # noqa: E731
    return jax.jit(run, compiler_options=options)


def log_probabilities(
    out: RolloutBatch, like: float, temperature: float = 1.0, batch: PromptBatch | None = None
) -> np.ndarray:
    """Teacher-forced, all tokens at once without a cache, of the whole vocabulary: [B, R, V].

    float64 from the hidden states on.
    """
    _, params = policy(FAMILY[like])
    batch = prompts() if batch is None else batch
    width, group_size = batch.tokens.shape[1], len(out.tokens) // len(batch.tokens)
    tokens = np.concatenate([np.repeat(batch.tokens, group_size, axis=0), out.tokens], axis=1)
    mask = np.concatenate([np.repeat(batch.mask, group_size, axis=0), out.response_mask], axis=1)
    hidden = np.asarray(hidden_states(like, width)(params, tokens, mask), np.float64)
    z = hidden @ np.asarray(head_weight(params), np.float64).T
    if (cap := SOFTCAP[FAMILY[like]]) is not None:
        assert np.abs(z).max() > 1.5 * cap
        z = cap * np.tanh(z / cap)
    return normalised(z / temperature)


def normalised(z: np.ndarray) -> np.ndarray:
    """z - log sum exp z over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def at_tokens(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """values[b, t, tokens[b, t]]"""
    return np.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def entropies(log_p: np.ndarray) -> np.ndarray:
    return -(np.exp(log_p) * log_p).sum(axis=-1)


def uniforms_of(out: RolloutBatch, group_size: int, seed: int) -> np.ndarray:
    """[B, R, 2] of the row's number in its group, the group's and the position, whatever else is in the batch."""

    def one(group, member, position):
        key = jax.random.key(seed)
        for number in (group, member, position):
            key = jax.random.fold_in(key, number)
        return jax.random.uniform(key, (2,)) + 2.0**-24

    rows, length = out.tokens.shape
    member = np.tile(np.arange(group_size), rows // group_size)
    numbers = np.broadcast_arrays(out.group[:, None], member[:, None], np.arange(length))
    return np.asarray(jax.vmap(jax.vmap(one))(*numbers), np.float64)


def passes(weight: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entry at which the cumulative share of `weight` passes u, and u's distance from the next boundary."""
    share = np.cumsum(weight, axis=-1) / weight.sum(axis=-1, keepdims=True)
    distance = np.abs(share[..., :-1] - u[..., None]).min(axis=-1)
    return (share <= u[..., None]).sum(axis=-1), distance


def redraw(log_p: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that these uniforms give, and how far they are from giving others."""
    p = np.exp(log_p).reshape(*log_p.shape[:-1], -1, BLOCK)
    block, far = passes(p.sum(axis=-1), u[..., 0])
    within, far_within = passes(np.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :], u[..., 1])
    return block * BLOCK + within, np.minimum(far, far_within)


def first_end(tokens: np.ndarray, eos_ids) -> np.ndarray:
    """Column of each row's first end-of-sequence token; R where there is none."""
    return np.array([next((t for t, x in enumerate(row) if x in eos_ids), tokens.shape[1]) for row in tokens])


def common_tokens(out: RolloutBatch) -> list[int]:
    """Token ids, the most frequent first."""
    return np.argsort(-np.bincount(out.tokens.ravel(), minlength=V), kind="stable").tolist()


def pair_that_ends(tokens: np.ndarray, first: list[int], second: list[int]) -> tuple[int, int]:
    """One of `first` and one of `second` that each end some row; and some row has neither."""
    length = tokens.shape[1]
    for pair in ((a, b) for a in first for b in second if a != b):
        end = first_end(tokens, pair)
        ending = {int(row[t]) for row, t in zip(tokens, end, strict=True) if t < length}
        if (end == length).any() and ending == set(pair):
            return pair
    raise AssertionError("no two tokens end rows")


@functools.cache
def ends(temperature: float, name: str) -> tuple[tuple[int, int], int]:
    """(eos_ids, pad_id), chosen among the tokens that the model does draw."""
    tokens, often = free(temperature).tokens, common_tokens(free(temperature))
    if name == "no end":
        return NEVER, 0
    if name == "ends at once":
        return pair_that_ends(tokens, tokens[:, 0].tolist(), often), often[0]
    eos_ids = pair_that_ends(tokens, often[1:], often[1:])
    return eos_ids, eos_ids[0] if name == "pad is eos" else often[0]


SCENARIOS = ["no end", "pad is eos", "pad is drawn", "ends at once"]
