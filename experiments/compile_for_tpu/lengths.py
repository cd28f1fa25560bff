"""Responses of many lengths: what a rollout of them costs in decode steps and in pages of its cache.

The scheduler of `dppo_jax.rollout` is followed slot by slot, without a model: what it would do is a function of the
lengths alone.
"""

import dataclasses
import math

import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.models import cache as blocks
from dppo_jax.models.pages import PAGE, count_for


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Of a whole rollout. Pages are of 128 tokens, summed over slots and decode steps."""

    slots: int
    decode_steps: int
    decode_steps_without_tail: float  # if every slot had a row until the end
    pages_read: int
    pages_live: int  # that held tokens of a live row
    put_back: int

    @property
    def live_share(self) -> float:
        """Of the slots, the part that had a row, on average."""
        return self.decode_steps_without_tail / max(self.decode_steps, 1)


def drawn_from(text: str, count: int, limit: int, seed: int = 0) -> np.ndarray:
    """Lengths i[count] of responses, from 1 to `limit`: "lognormal:MEAN:SIGMA" (the mean of the length, the deviation
    of its logarithm) or "uniform:A:B". UserError for what is neither."""
    kind, *numbers = text.split(":")
    try:
        first, second = map(float, numbers)
    except ValueError:
        first = second = math.nan
    rng = np.random.default_rng(seed)
    if kind == "lognormal" and first > 0 and second >= 0:
        found = rng.lognormal(math.log(first) - second**2 / 2, second, count)
    elif kind == "uniform" and 1 <= first <= second:
        found = rng.uniform(first, second + 1, count)
    else:
        raise UserError(f"lengths {text!r} are neither lognormal:MEAN:SIGMA, uniform:A:B nor the folder of a run")
    return np.clip(np.floor(found), 1, limit).astype(np.int64)


def _sum_of_pages(tokens: np.ndarray) -> np.ndarray:
    """Pages of 1 token + pages of 2 tokens + ... + pages of so many."""
    full, rest = np.divmod(tokens, PAGE)
    return PAGE * full * (full + 1) // 2 + rest * (full + 1)


def decoding(
    prompts: np.ndarray,
    responses: np.ndarray,
    *,
    slots: int,
    shards: int = 1,
    columns: int | None = None,
    pages: int | None = None,
) -> Decoding:
    """Of rows with these prompt and response lengths, i[B], one group after another.

    `columns`: of a cache in blocks of so many columns in all, which every slot reads as far as the longest row goes
    (None: of pages). `pages`: how many a shard has beside its prompts' (None: enough).
    """
    batch = len(responses)
    slots = min(slots, batch)
    per_shard, rows_per_shard = slots // shards, batch // shards
    row, held, left = np.full(slots, batch), np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    drawn = np.ones(batch, np.int64)
    waits = responses > 1
    totals = dict(decode_steps=0, pages_read=0, pages_live=0, put_back=0)
    own = np.zeros(slots, np.int64)  # pages
    free = np.full(shards, np.iinfo(np.int64).max if pages is None else pages)
    edges = None if columns is None else np.asarray(blocks.edges(columns))

    def room(shard: int) -> np.ndarray:
        """Rows of a shard that may be admitted, in order."""
        mine = np.flatnonzero(waits[shard * rows_per_shard : (shard + 1) * rows_per_shard]) + shard * rows_per_shard
        if pages is None:
            return mine
        at = slice(shard * per_shard, (shard + 1) * per_shard)
        live = row[at] < batch
        most = count_for(held[at] + left[at])
        growing = int(np.sum(live & (most > count_for(held[at]))))
        tokens = prompts[mine] + drawn[mine]
        needs = count_for(tokens) - prompts[mine] // PAGE
        grows = count_for(prompts[mine] + responses[mine] - 1) > count_for(tokens)
        fits = np.cumsum(needs + grows) + growing <= free[shard]
        if not live.any() and len(mine):
            fits[0] = True
        return mine[fits]

    def admit() -> None:
        for shard in range(shards):
            idle = np.flatnonzero(row[shard * per_shard : (shard + 1) * per_shard] == batch) + shard * per_shard
            taken = room(shard)[: len(idle)]
            idle = idle[: len(taken)]
            row[idle], waits[taken] = taken, False
            held[idle], left[idle] = prompts[taken] + drawn[taken] - 1, responses[taken] - drawn[taken]
            own[idle] = count_for(held[idle] + 1) - prompts[taken] // PAGE
            if pages is not None:
                free[shard] -= own[idle].sum()

    def fillable() -> int:
        idle = (row == batch).reshape(shards, -1).sum(axis=1)
        return sum(min(int(idle[shard]), len(room(shard))) for shard in range(shards))

    while waits.any() or (row < batch).any():
        admit()
        while (row < batch).any():
            live = row < batch
            steps = int(left[live].min())
            if edges is not None:
                longest = int(held[live].max()) + 1
                edge = int(edges[np.searchsorted(edges[1:], longest) + 1])
                steps = min(steps, edge - longest + 1)
                totals["pages_read"] += steps * slots * count_for(edge)
            totals["decode_steps"] += steps
            read = int(np.sum(_sum_of_pages(held[live] + steps) - _sum_of_pages(held[live])))
            totals["pages_live"] += read
            if edges is None:
                totals["pages_read"] += read
            held[live] += steps
            left[live] -= steps
            done = live & (left == 0)
            row[done] = batch
            enough = min(max(int(waits.sum()), 1), max(1, slots // 16))
            if done.any() and fillable() >= enough:
                break
    return Decoding(slots, decode_steps_without_tail=float(np.sum(responses - 1)) / slots, **totals)
