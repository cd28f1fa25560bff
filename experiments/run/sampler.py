"""Everything before the rewards: prompts, behavior parameters, rollouts, replies, and the scores in the making."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.data.examples import UNSCORED
from dppo_jax.data.prompts import PromptStream, decode_replies
from dppo_jax.devices import hosts
from dppo_jax.devices.sharding import laid_out
from dppo_jax.errors import UserError
from dppo_jax.lora import joined
from dppo_jax.metrics import unequal_groups
from dppo_jax.models.decoder import Params
from dppo_jax.rewards import shaping
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.worker import Outcome
from dppo_jax.rollout import Finished, Work
from dppo_jax.sampling import step_key
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.run.carried import NAME, Carried
from experiments.run.conversing import Conversing, Scored
from experiments.run.reward_model import RewardModel
from experiments.run.rollouts import batch_calls, whole_batch_rollout
from experiments.run.runs import Runs
from experiments.run.samples import WORK, Drawing, Replies, Samples, chosen, merged, rows_of
from experiments.run.setup import ROLLOUT

# Further draws of a step (rollout.resample) take the prompts of a step so far away that no run comes there by itself.
AWAY = 1_000_003


class Sampler:
    """Draws the rollout of every step from the parameters that the learner publishes.

    `streams` of prompts, one a run; one `scorer` for all, and one reward model, if there is one.
    """

    def __init__(
        self, runs: Runs, streams: list[PromptStream], scorer: Scorer, reward_model: RewardModel | None = None
    ):
        base = runs.base
        self._runs, self._streams, self._scorer, self._reward_model = runs, streams, scorer, reward_model
        self._config, self._text, self._mesh = base.config, base.text, base.mesh
        c = base.config.rollout
        self.prompt_share = hosts.share_over(base.mesh, c.prompts)
        self.row_share = self.prompt_share.grouped(c.group_size)
        rollout = whole_batch_rollout(base, topk=runs.topk, entropy=runs.needs_entropy)
        self._generate = batch_calls(runs, rollout)
        self._talks: Conversing | None = None
        if base.config.data.kind == "environment":
            if runs.stacked:
                raise UserError("data.kind = 'environment' is for one run at a time: start experiments.train")
            self._talks = Conversing(runs, self._prompts_of, streams[0], scorer)
        self._carried = Carried(runs, self._prompts_of) if c.in_flight and not self._talks else None
        shardings = None if base.mesh is None else base.shardings.params
        self._copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=shardings)
        self._params: Params = {}  # what the learner trains
        self._frozen: Params = {}  # what no run trains of its policy
        self._param_history: deque[Params] = deque(maxlen=c.lag + 1)  # after each of the last updates, oldest first
        self._next_rollout: tuple[RolloutBatch, Work | None] | None = None  # drawn a step early
        self._begun: Callable[[], Drawing] | None = None  # waits for the rollout that was started

    def close(self) -> None:
        """Ends what it started."""
        if self._talks:
            self._talks.close()

    # --- parameters ---

    def publish(self, params: Params, frozen: Params) -> None:
        """The learner's parameters after an update, which takes the ones before away: what is trained, what is not."""
        self._params, self._frozen = params, frozen
        if self._config.rollout.lag:
            self._param_history.append(self._copy(params))

    @property
    def _behavior(self) -> Params:
        return self._param_history[0] if self._param_history else self._params

    # --- one step ---

    def start(self, step: int) -> None:
        """Has the devices draw the rollout of a step, unless they did so early."""
        clock = {"began": time.perf_counter()}
        params = self._behavior  # not those that drew an early rollout: checks refuses what would need them
        behavior = joined(self._frozen, params)
        draws = self._carried or self._talks
        drawn = self._groups(draws.start(behavior, step)) if draws else self._batch(behavior, step)
        if self._runs.needs_exact and (draws or not self._param_history):
            params = self._copy(params)  # the updates donate the learner's
        self._begun = lambda: Drawing(**drawn(), params=params, clock=clock)

    def _groups(self, finish: Callable[[], Finished]) -> Callable[[], dict[str, Any]]:
        """What `finish` gives of groups that several steps drew, as fields of `Drawing`."""

        def drawn() -> dict[str, Any]:
            finished = finish()
            fields = dict(prompts=finished.prompts, rollout=finished.rollout, work=finished.work, finished=finished)
            return fields | dict(age=0, equal_params=False)

        return drawn

    def _batch(self, behavior: Params, step: int) -> Callable[[], dict[str, Any]]:
        """Begins a whole batch, unless it was drawn early; call the result for it, as fields of `Drawing`."""
        prompts = self._prompts_of(step)
        early, self._next_rollout = self._next_rollout, None
        equal_params = early is None and len(self._param_history) <= 1
        started = None if early else self._generate.start(behavior, prompts, self._keys(step))

        def drawn() -> dict[str, Any]:
            rollout, work = early or self._generate.finish(started)
            fields = dict(prompts=prompts, rollout=rollout, work=work, finished=None)
            return fields | dict(age=int(early is not None), equal_params=equal_params)

        return drawn

    def collect(self, step: int) -> Samples:
        """Waits for the rollout, decodes it, and hands its replies to the verifiers; more batches where groups are
        equal and the config asks for others. `Abandoned` where the run is asked to stop in the midst of a rollout."""
        assert self._begun is not None
        begun, self._begun = self._begun, None
        drawing = begun()
        host = self._to_host(drawing.rollout)
        drawing.clock["drawn"] = time.perf_counter()
        if self._config.train.staleness and step + 1 < self._config.steps:
            self._next_rollout = self._sample(self._prompts_of(step + 1), step + 1)
        samples = self._submitted(step, drawing, host)
        return self._resampled(step, samples) if max(self._further_batches) else samples

    def _prompts_of(self, step: int) -> PromptBatch:
        """The prompts of a step, of all runs, on the devices."""
        batches = [stream.batch(step, self.prompt_share.held)[0] for stream in self._streams]
        return hosts.to_global(self._runs.together(batches), self._mesh, self.prompt_share)

    def _sample(self, prompts: PromptBatch, step: int) -> tuple[RolloutBatch, Work]:
        return self._generate(joined(self._frozen, self._behavior), prompts, self._keys(step))

    def _keys(self, step: int) -> jax.Array:
        return self._runs.together([step_key(run.config.seed, step, ROLLOUT) for run in self._runs.setups])

    def _conversed(self, samples: Samples) -> Samples:
        """With what environments said of the conversations: their scores, and what of them is the policy's own."""
        assert self._talks is not None and samples.drawing.finished is not None
        (replies,), rollout = samples.replies, samples.drawing.rollout
        fields = samples.drawing.finished.told, rollout.tokens, rollout.response_mask, rollout.own
        told, tokens, mask, own = hosts.owned(fields, self.row_share)
        turns, context, replies.own_lengths = hosts.gather(
            (told.turns, (mask & ~own).sum(axis=1, dtype=np.int32), own.sum(axis=1, dtype=np.int32)), self.row_share
        )
        replies.own_texts = decode_replies(self._text.tokenizer, tokens, own, self._text.eos_ids)
        replies.fault = self._talks.fault
        means = {"turns_mean": float(turns.mean()), "context_mean": float(context.mean())}
        replies.work |= self._talks.counts | means
        return dataclasses.replace(samples, pending=[Scored(told)])

    def _to_host(self, rollout: RolloutBatch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """By run: tokens and mask of this host's responses; lengths i[B] and truncated bool[B] of all of them."""
        fields = hosts.owned((rollout.tokens, rollout.response_mask, rollout.truncated), self.row_share)
        by_run = []
        for tokens, mask, truncated in self._runs.apart(fields):
            lengths = mask.sum(axis=1, dtype=np.int32)
            by_run.append((tokens, mask, *hosts.gather((lengths, truncated), self.row_share)))
        return by_run

    def _origins(self, step: int, drawing: Drawing) -> list[np.ndarray]:
        """By run, of every group the step whose prompts it is of and its number among them, i[N, 2]."""
        if drawing.finished is None:
            number = np.arange(self.prompt_share.size)
            return [np.stack([np.full_like(number, step), number], axis=1)] * len(self._runs)
        origins = self._runs.apart(hosts.owned(drawing.finished.origin, self.prompt_share))
        return [hosts.gather(origin, self.prompt_share) for origin in origins]

    def _submitted(self, step: int, drawing: Drawing, host: Sequence[tuple[np.ndarray, ...]]) -> Samples:
        """Samples whose replies are at the verifiers; `host` as of `_to_host`."""
        replies, pending = [], []
        none: np.ndarray = np.zeros(0, np.float32)
        of_run = zip(self._streams, self._origins(step, drawing), self._work(drawing), host, strict=True)
        for stream, origin, (work, live), (tokens, mask, lengths, truncated) in of_run:
            of_group, prompt_lengths = stream.of_groups(origin)
            group_size = self._config.rollout.group_size
            examples = [of_group[number] for number in self.prompt_share.owned for _ in range(group_size)]
            texts = decode_replies(self._text.tokenizer, tokens, mask, self._text.eos_ids)
            pairs = dict(zip(self.row_share.owned.tolist(), zip(examples, texts, strict=True), strict=True))
            unscored = self._config.data.verifier == UNSCORED and not self._config.reward.function
            own = Replies(prompt_lengths, lengths, truncated, pairs, none, none, {}, work, live=live, unscored=unscored)
            own.critic_prompts = stream.critic_prompts(origin)
            replies.append(own)
            if not self._talks:
                pending.append(self._scorer.submit(texts, examples))
        if drawing.finished is not None:
            drawing = drawing._replace(equal_params=all(run.work["age_max"] == 0 for run in replies))
        samples = Samples(drawing, replies, pending)
        return self._conversed(samples) if self._talks else samples

    def _work(self, drawing: Drawing) -> list[tuple[dict[str, float], float | None]]:
        """By run, what a rollout cost and how old it is, by the log's names; and, if known, `Replies.live`."""
        count, finished = len(self._runs), drawing.finished
        ages = [dict(age_mean=float(drawing.age), age_max=float(drawing.age), in_flight=0.0)] * count
        if finished is not None:
            fields = dict(age_mean=finished.age_mean, age_max=finished.age_max, in_flight=finished.rows_left)
            ages = [{name: float(x) for name, x in run.items()} for run in self._runs.apart(jax.device_get(fields))]
        if drawing.work is None:
            return [(age, None) for age in ages]
        works = self._runs.apart(jax.device_get(drawing.work))
        return [
            (age | {name: float(getattr(work, name)) for name in WORK}, float(work.live))
            for age, work in zip(ages, works, strict=True)
        ]

    def rewards(self, samples: Samples) -> list[Replies]:
        """Waits until every host has scored its share of the replies, and fills in the rewards of all."""
        for replies, scores, setup in zip(samples.replies, samples.pending or (), self._runs.setups, strict=False):
            texts, owned = [text for _, text in replies.pairs.values()], self.row_share.owned
            model_scores, cut = self._model_scores(replies)  # while the verifier is at work
            rewards, counts = scores.result()
            texts = replies.own_texts or texts
            responses = shaping.Responses(texts, replies.lengths[owned], rewards, model_scores)
            terms, stopped = shaping.values(responses, setup.terms, setup.term_settings)
            replies.counts = hosts.total(counts | stopped | cut)
            replies.verified, terms = hosts.gather((rewards, terms), self.row_share)
            replies.shaped_rewards = shaping.total(terms, setup.terms, len(replies.verified))
            replies.terms = {f"term/{name}": term for name, term in terms.items()}
            if setup.config.reward.function:
                replies.terms |= self._parts(scores.scored)
                replies.fault = next((o.message for o in scores.scored if o.kind == "failed"), "")
            if setup.config.reward.function or self._talks:
                _check_binary(setup.config.advantage.name, replies.verified)
        samples.pending = None
        samples.mark("scored")
        return samples.replies

    def _model_scores(self, replies: Replies) -> tuple[np.ndarray | None, dict[str, int]]:
        """Of the rows that this host owns the reward model's scores f32[b], and counts; without one None."""
        if self._reward_model is None:
            return None, {}
        scores, cut = self._reward_model(replies.pairs, self.row_share)
        return scores[self.row_share.owned], {"model_cut": cut}

    def _parts(self, outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
        """By name, f32[B], the parts that a function of one's own gave of a reply's reward; 0 where it gave none."""
        names = hosts.all_names({name for outcome in outcomes for name, _ in outcome.parts})
        parts = {
            f"part/{name}": np.array([dict(outcome.parts).get(name, 0.0) for outcome in outcomes], np.float32)
            for name in names
        }
        return hosts.gather(parts, self.row_share)

    # --- dynamic sampling (DAPO, 2503.14476, section 3.2) ---

    def _resampled(self, step: int, samples: Samples) -> Samples:
        """Groups of equal rewards make room for unequal ones of further batches, until there is none or enough were
        drawn. A run that is done with it, or has none, keeps what it has, and is drawn beside the others in vain."""
        self.rewards(samples)
        for attempt in range(1, max(self._further_batches) + 1):
            unequal = self._unequal(samples)
            done = [
                attempt > most or bool(groups.all())
                for most, groups in zip(self._further_batches, unequal, strict=True)
            ]
            if all(done):
                break
            far_step = step + attempt * AWAY
            prompts = self._prompts_of(far_step)
            rollout, work = self._sample(prompts, far_step)
            drawing = samples.drawing._replace(prompts=prompts, rollout=rollout, work=work)
            more = self._submitted(far_step, drawing, self._to_host(drawing.rollout))
            self.rewards(more)
            pairs = zip(unequal, self._unequal(more), strict=True)
            sources = [chosen(groups, more_groups) for groups, more_groups in pairs]
            samples = self._merged(samples, more, sources, done)
        return samples

    @functools.cached_property
    def _further_batches(self) -> list[int]:
        """rollout.resample of every run."""
        return [setup.config.rollout.resample for setup in self._runs.setups]

    def _unequal(self, samples: Samples) -> list[np.ndarray]:
        """By run, which groups have unequal rewards, bool[N]."""
        group = self._config.rollout.group_size
        return [unequal_groups(replies.shaped_rewards, group)[::group] for replies in samples.replies]

    def _merged(self, before: Samples, more: Samples, sources: list[np.ndarray], done: list[bool]) -> Samples:
        """One batch of the two, the groups of every run taken as its `sources` say (see `chosen`), but for those that
        are `done`."""
        group = self._config.rollout.group_size
        kept = np.arange(self._config.rollout.prompts)
        sources = [kept if over else own for own, over in zip(sources, done, strict=True)]
        by_row = [rows_of(source, group) for source in sources]
        a, b = before.drawing, more.drawing
        prompts = self._take(a.prompts, b.prompts, self._runs.together(sources))
        rollout = self._take(a.rollout, b.rollout, self._runs.together(by_row))
        prompts, rollout = prompts.replace(group=a.prompts.group), rollout.replace(group=a.rollout.group)
        drawing = a._replace(prompts=prompts, rollout=rollout)
        of_runs = zip(before.replies, more.replies, sources, done, strict=True)
        replies = [first if over else merged(first, second, source, group) for first, second, source, over in of_runs]
        return Samples(drawing, replies, None)

    @functools.cached_property
    def _take(self):
        def take(a, b, index):
            return jax.tree.map(lambda x, y: jnp.concatenate([x, y])[index], a, b)

        return jax.jit(self._runs.at_once(take), out_shardings=self._runs.base.by_row)

    # --- checkpoints ---

    def saved(self) -> dict[str, Any]:
        """What a checkpoint needs of the sampler, beside the learner's state."""
        history = list(self._param_history)
        ahead, work = self._next_rollout or (None, None)
        state = {"ahead": ahead, "ahead_work": work, "past": history or None}
        for draws in (self._carried, self._talks):
            state |= draws.saved() if draws else {}
        return {name: value for name, value in state.items() if value is not None}

    def shapes(self, step: int, params: Any, policy: Any, held: Callable[[str], Any] | None = None) -> dict[str, Any]:
        """Shapes and shardings of what `saved` gave at a step, for parameters of these shapes; `held` gives the shapes
        of what a checkpoint has of a name, None where it has nothing. Without it, of all there may be at some step."""
        c, base, result = self._config, self._runs.base, {}
        if c.train.staleness if held is None else held("ahead"):
            prompts = self._runs.together([stream.batch(step)[0] for stream in self._streams])
            ahead, work = jax.eval_shape(self._generate, policy, prompts, self._keys(step))
            result["ahead"] = laid_out(ahead, base.by_row)
            if held is None or held("ahead_work"):
                result["ahead_work"] = laid_out(work, base.everywhere)
        draws = self._carried or self._talks
        if draws and (c.rollout.in_flight if held is None else held(NAME)):
            result |= draws.shapes(held and held(NAME))
        if c.rollout.lag:
            updates = step * self._runs.base.updates_per_step
            result["past"] = [params] * min(updates + 1, c.rollout.lag + 1)
        return result

    def restore(self, saved: dict[str, Any], params: Params, frozen: Params, step: int) -> None:
        """From a checkpoint, or fresh where it has nothing; with the learner's parameters."""
        self._frozen = frozen
        self._next_rollout = (saved["ahead"], saved.get("ahead_work")) if "ahead" in saved else None
        if self._carried and NAME in saved:
            self._carried.restore(saved, step)
        if self._talks:
            self._talks.restore(saved, step)
        self._param_history.extend(saved.get("past", []))
        self._params = params
        if self._config.rollout.lag and not self._param_history:
            self.publish(params, frozen)


def _check_binary(advantage: str, rewards: np.ndarray) -> None:
    """UserError where an advantage that is for rewards of 0 and 1 is given others."""
    other = rewards[(rewards != 0) & (rewards != 1)]
    if advantage == "max_rl" and len(other):
        raise UserError(
            f"advantage.name = max_rl is for rewards of 0 and 1, but one is {other[0]:g}: take another "
            "advantage.name, or let the function or the environment give 0 and 1"
        )
