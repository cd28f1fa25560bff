"""Responses of many lengths: what a rollout of them costs in decode steps and in pages of its cache.

The scheduler of `dppo_jax.rollout` is followed slot by slot, without a model: what it would do is a function of the
lengths alone. Arrays are [D, s] of the slots of D shards and [D, b] of their rows. Between two events, of which the
scheduler could take notice, it goes on in one stride: an end of a row, a page that is full, a longer read of blocks.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.files import to_path
from dppo_jax.models import cache as blocks
from dppo_jax.models.pages import PAGE, count_for
from dppo_jax.rollout import resumed_tokens
from dppo_jax.storage.run_log import first_and_last, read_scalars

LONGEST, WIDEST = 10_000_000, 5.0  # tokens of a response; the deviation of the logarithm
SIGMA = 1.0  # of the logarithm of lengths, where a run's log has their mean alone
TAG = "response/length_mean"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a rollout. Counts of rows and slots are of all shards together."""

    slots: int
    group_size: int
    shards: int = 1
    limit: int | None = None  # response tokens that the scheduler must expect of a row; None: as many as it has
    pages: int | None = None  # that a shard has beside its prompts'; None: enough. There is room for one row always
    width: int = 0  # pages of the longest row that there may be
    page_block: int = 0  # pages that the attention reads at a time, of an idle slot too; 0: a live slot's alone
    columns: int | None = None  # of a cache in blocks, in all, of which every slot reads the same; None: of pages
    prompt_columns: int = 0  # in blocks, of which a response begins after so many


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Of a whole rollout. Pages and blocks are counted in 128 tokens, summed over slots and decode steps."""

    slots: int
    decode_steps: int
    live: int  # decode steps in which a slot had a row, summed over slots
    pages_read: int
    pages_live: int  # that held tokens of a live row
    tokens_live: int  # in the cache, of live rows
    slowest_pages: int  # read by the shard that reads most, summed over decode steps
    put_back: int
    resumes: int  # passes of `resumed_tokens` tokens a shard, of rows that have some of their responses

    @property
    def decode_steps_without_tail(self) -> float:
        """If every slot had a row until the end."""
        return self.live / self.slots

    @property
    def live_share(self) -> float:
        """Of the slots, the part that had a row, on average."""
        return self.decode_steps_without_tail / max(self.decode_steps, 1)


def drawn_from(text: str, count: int, limit: int, seed: int = 0) -> np.ndarray:
    """Lengths i[count] of responses, from 1 to `limit`: "lognormal:MEAN:SIGMA" (the mean of the length, the deviation
    of its logarithm), "uniform:A:B", or the folder of a run. UserError for what is neither.

    A run's log has the mean of every step's lengths: that of its last steps is taken, as of a lognormal distribution
    with a deviation of 1.
    """
    kind, *numbers = text.split(":")
    if text and kind not in ("lognormal", "uniform") and to_path(text).is_dir():
        return drawn_from(f"lognormal:{logged_mean(text)}:{SIGMA}", count, limit, seed)
    try:
        first, second = map(float, numbers)
    except ValueError:
        first = second = math.nan
    if kind not in ("lognormal", "uniform") or len(numbers) != 2 or math.isnan(first + second):
        raise UserError(
            f"lengths {text!r:.200} are neither lognormal:MEAN:SIGMA, uniform:A:B (numbers) nor the folder of a run"
        )
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        if not (0 < first <= LONGEST and 0 <= second <= WIDEST):
            raise UserError(
                f"lengths {text!r:.200}: MEAN must be above 0 and at most {LONGEST:,}, SIGMA from 0 to {WIDEST:g}"
            )
        lengths = rng.lognormal(math.log(first) - second**2 / 2, second, count)
    else:
        if not 1 <= first <= second <= LONGEST:
            raise UserError(f"lengths {text!r:.200}: A must be at least 1, B at least A and at most {LONGEST:,}")
        lengths = rng.uniform(first, second + 1, count)
    return np.clip(np.floor(lengths), 1, limit).astype(np.int64)


def logged_mean(run_dir: str) -> float:
    """The mean response length of a run's last steps. UserError where its log has none."""
    last = first_and_last(read_scalars(run_dir))[1]
    if TAG not in last:
        raise UserError(f"the log in {run_dir!r} has no {TAG}")
    return last[TAG]


def _sum_of_pages(tokens: np.ndarray, page: int) -> np.ndarray:
    """Pages of 1 token + pages of 2 tokens + ... + pages of so many."""
    full, rest = np.divmod(tokens, page)
    return page * full * (full + 1) // 2 + rest * (full + 1)


def decoding(prompts: np.ndarray, responses: np.ndarray, settings: Settings) -> Decoding:
    """Of rows with these prompt and response lengths, i[B], one group after another."""
    shape = settings.shards, -1
    scheduler = Scheduler(prompts.reshape(shape), responses.reshape(shape), settings)
    scheduler.run()
    return scheduler.totals()


@dataclasses.dataclass(frozen=True)
class Flight:
    """Rows in flight, as `rollout.InFlight` has them: `prompts` groups leave in a step of training."""

    prompts: int
    ahead: int
    max_age: int


def in_flight(
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]], settings: Settings, flight: Flight, steps: int
) -> list[Decoding]:
    """Of each of so many training steps, the first of which begins with no rows. batch(number) gives the prompt and
    response lengths i[N G] of a batch of prompts."""
    shards, group = settings.shards, settings.group_size
    per_step = flight.prompts // shards
    there: dict[str, np.ndarray] = {}  # [D, c, G] of the groups that are being drawn, in the order of their beginning
    decodings = []
    for step in range(steps):
        for number in range(step + flight.ahead if step else 0, step + flight.ahead + 1):
            prompts, responses = (x.reshape(shards, per_step, group) for x in batch(number))
            nothing = np.zeros_like(responses)
            new = dict(prompts=prompts, responses=responses, batch=nothing + number, drawn=nothing, ended=nothing > 0)
            there = {name: np.concatenate([there[name], x], axis=1) if there else x for name, x in new.items()}
        by_row = {name: x.reshape(shards, -1) for name, x in there.items()}
        begun = by_row["drawn"] > 0
        waits = np.where(begun, ~by_row["ended"], by_row["responses"] > 1)
        progress = np.maximum(by_row["drawn"], 1)
        scheduler = Scheduler(by_row["prompts"], by_row["responses"], settings, progress, waits)
        scheduler.missing = waits.reshape(there["drawn"].shape).sum(axis=2)
        scheduler.due = there["batch"][..., 0] <= step + flight.ahead - flight.max_age
        scheduler.wanted = per_step
        scheduler.run()
        decodings.append(scheduler.totals())
        there["drawn"], there["ended"] = (x.reshape(there["drawn"].shape) for x in scheduler.drawn_and_ended())
        complete = scheduler.missing == 0
        leaves = complete & (np.cumsum(complete, axis=1) <= per_step)
        stay = np.argsort(leaves, axis=1, kind="stable")[:, : leaves.shape[1] - per_step, None]
        there = {name: np.take_along_axis(x, stay, axis=1) for name, x in there.items()}
    return decodings


def _passes(lengths: np.ndarray, most: int) -> int:
    """How many rows of at most `most` tokens take pieces of these lengths, one after another, none of them cut."""
    count = room = 0
    for length in lengths.tolist():
        if length > room:
            count, room = count + 1, most
        room -= length
    return count


class Scheduler:
    """A rollout that is going on: rows of these prompt and response lengths, i[D, b].

    `progress` is how many tokens of the response every row has (None: its first), `waits` b[D, b] which rows are to be
    decoded (None: all that need more). `missing` i[D, n] is how many rows of a group have yet to end (None: all rows
    are drawn to their end), `due` b[D, n] which groups must be complete, `wanted` how many of every shard.
    """

    def __init__(
        self,
        prompts: np.ndarray,
        responses: np.ndarray,
        settings: Settings,
        progress: np.ndarray | None = None,
        waits: np.ndarray | None = None,
    ):
        self.settings, self.prompts, self.responses = settings, prompts, responses
        self.progress = np.ones_like(responses) if progress is None else progress.copy()
        self.waits = responses > self.progress if waits is None else waits.copy()
        shards, self.per_shard = responses.shape
        self.slots = min(settings.slots, responses.size)
        shape = shards, self.slots // shards
        self.row = np.full(shape, self.per_shard)
        self.held, self.left, self.count, self.shared = (np.zeros(shape, np.int64) for _ in range(4))
        limit = responses if settings.limit is None else settings.limit
        self.most = count_for(prompts + limit - 1)  # pages of a row, so far as the scheduler knows
        width = max(settings.width, int(self.most.max()))
        enough = settings.pages is None or settings.pages >= shape[1] * width
        self.free = None if enough else np.full(shards, max(settings.pages or 0, width))
        prompts_per_shard = self.per_shard // settings.group_size
        longest_prompt = settings.prompt_columns or int(prompts.max())
        self.resumed_tokens = resumed_tokens(longest_prompt, settings.limit or int(responses.max()))
        self.missing: np.ndarray | None = None
        self.due, self.wanted = np.zeros((shards, prompts_per_shard), bool), 0
        self.sums = dict.fromkeys((f.name for f in dataclasses.fields(Decoding) if f.name != "slots"), 0)

    def totals(self) -> Decoding:
        """Of all that was decoded so far."""
        return Decoding(slots=self.slots, **self.sums)

    def drawn_and_ended(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that every row has, i[D, b], 0 where a first one is drawn again, and whether it has ended."""
        progress, in_slot = self.progress.copy(), np.zeros_like(self.waits)
        shard, slot = np.nonzero(self.live)
        row = self.row[shard, slot]
        in_slot[shard, row] = True
        progress[shard, row] = self.held[shard, slot] - self.prompts[shard, row] + 1
        ended = ~(self.waits | in_slot)
        unfinished = np.where(in_slot | (progress > 1), progress, 0)
        return np.where(ended, self.responses, unfinished), ended

    @property
    def live(self) -> np.ndarray:
        """b[D, s]: whether a slot has a row."""
        return self.row < self.per_shard

    def run(self) -> None:
        """All that is to be drawn, drawn."""
        while self._unfinished():
            self._make_room()
            self._admit()
            while self._decoding():
                self._advance()

    def _of_row(self, table: np.ndarray) -> np.ndarray:
        """[D, s] of [D, b]: each slot's row's; an idle slot's mean nothing."""
        return np.take_along_axis(table, np.minimum(self.row, self.per_shard - 1), axis=1)

    def _unfinished(self) -> bool:
        if self.missing is None:
            return bool(self.live.any() or self.waits.any())
        complete = self.missing == 0
        return bool((self.due & ~complete).any() or (complete.sum(axis=1) < self.wanted).any())

    def _admissible(self) -> np.ndarray:
        """b[D, b]: rows for which there is room, as `Pages.admissible` has it."""
        if self.free is None:
            return self.waits
        tokens, live = self.prompts + self.progress, self.live
        needs = count_for(tokens) - self.prompts // PAGE + (self.most > count_for(tokens))
        growing = np.sum(live & (self._of_row(self.most) > self.count), axis=1, keepdims=True)
        fits = np.cumsum(np.where(self.waits, needs, 0), axis=1) + growing <= self.free[:, None]
        alone = ~live.any(axis=1, keepdims=True) & (np.cumsum(self.waits, axis=1) == 1)
        return self.waits & (fits | alone)

    def _wants(self) -> np.ndarray:
        return self.live & (self.held >= self.count * PAGE)

    def _decoding(self) -> bool:
        remaining, live = self._admissible().sum(axis=1), self.live
        fillable = int(np.minimum((~live).sum(axis=1), remaining).sum())
        enough = min(max(int(self.waits.sum()), 1), max(1, self.slots // 16))
        short = self.free is not None and bool((self._wants().sum(axis=1) > self.free).any())
        return bool(live.any()) and fillable < enough and not short and self._unfinished()

    def _admit(self) -> None:
        idle, admissible = ~self.live, self._admissible()
        order = np.cumsum(idle, axis=1) - 1
        taken = idle & (order < admissible.sum(axis=1, keepdims=True))
        rows = np.argsort(~admissible, axis=1, kind="stable")
        index = np.take_along_axis(rows, np.clip(order, 0, self.per_shard - 1), axis=1)
        self.row = np.where(taken, index, self.row)
        shard, slot = np.nonzero(taken)
        row = self.row[shard, slot]
        prompts, drawn = self.prompts[shard, row], self.progress[shard, row]
        self.waits[shard, row] = False
        self.held[shard, slot], self.left[shard, slot] = prompts + drawn - 1, self.responses[shard, row] - drawn
        self.count[shard, slot], self.shared[shard, slot] = count_for(prompts + drawn), prompts // PAGE
        if self.free is not None:
            self.free -= np.sum(np.where(taken, self.count - self.shared, 0), axis=1)
        tokens, cold = prompts + drawn - 1, drawn > 1
        by_shard = [tokens[cold & (shard == number)] for number in range(len(self.row))]
        self.sums["resumes"] += max(_passes(one, self.resumed_tokens) for one in by_shard)

    def _make_room(self) -> None:
        """The rows that began last wait again, as `Pages.make_room` has it."""
        if self.free is None:
            return
        live, wants = self.live, self._wants()
        own = np.where(live, self.count - self.shared, 0)
        last_first = np.argsort(np.where(live, -self.row, 1), axis=1, kind="stable")
        freed, dropped = (np.cumsum(np.take_along_axis(x, last_first, axis=1), axis=1) for x in (own, wants))
        needed = wants.sum(axis=1)
        enough = needed[:, None] - dropped <= self.free[:, None] + freed
        number = np.where(needed > self.free, np.argmax(enough, axis=1) + 1, 0)
        leaves = np.argsort(last_first, axis=1, kind="stable") < number[:, None]
        shard, slot = np.nonzero(leaves)
        row = self.row[shard, slot]
        self.waits[shard, row] = True
        self.progress[shard, row] = self.held[shard, slot] - self.prompts[shard, row] + 1
        self.free += np.sum(np.where(leaves, own, 0), axis=1)
        self.row[leaves] = self.per_shard
        self.sums["put_back"] += len(slot)

    def _advance(self) -> None:
        """Decode steps until the next event."""
        live = self.live
        steps = int(self.left[live].min())
        edge = 0
        if self.settings.columns is not None:
            in_cache = self.held - self._of_row(self.prompts) + self.settings.prompt_columns
            longest = int(in_cache[live].max()) + 1
            edges = np.asarray(blocks.edges(self.settings.columns))
            edge = int(edges[np.searchsorted(edges[1:], longest) + 1])
            steps = min(steps, edge - longest + 1)
        if self.free is not None:
            wants = self._wants()
            self.count, self.free = self.count + wants, self.free - wants.sum(axis=1)
            steps = min(steps, int((self.count * PAGE - self.held)[live].min()))
        self._charge(live, steps, edge)
        self.held, self.left = self.held + steps * live, self.left - steps * live
        self._end(live & (self.left == 0))

    def _charge(self, live: np.ndarray, steps: int, edge: int) -> None:
        def pages(size: int) -> np.ndarray:
            return np.where(live, _sum_of_pages(self.held + steps, size) - _sum_of_pages(self.held, size), 0)

        block = self.settings.page_block
        read = pages(PAGE) if not block else block * np.where(live, pages(PAGE * block), steps)
        if edge:
            read = np.full(live.shape, steps * count_for(edge))
        tokens = np.where(live, steps * self.held + steps * (steps + 1) // 2, 0)
        self.sums["decode_steps"] += steps
        self.sums["live"] += steps * int(live.sum())
        self.sums["pages_read"] += int(read.sum())
        self.sums["pages_live"] += int(pages(PAGE).sum())
        self.sums["tokens_live"] += int(tokens.sum())
        self.sums["slowest_pages"] += int(read.sum(axis=1).max())

    def _end(self, ended: np.ndarray) -> None:
        """These slots' rows have their last token."""
        if self.free is not None:
            self.free += np.sum(np.where(ended, self.count - self.shared, 0), axis=1)
        if self.missing is not None:
            shard, slot = np.nonzero(ended)
            np.subtract.at(self.missing, (shard, self.row[shard, slot] // self.settings.group_size), 1)
        self.row[ended] = self.per_shard
