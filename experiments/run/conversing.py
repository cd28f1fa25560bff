"""The conversations of a run: the devices draw turns, reward workers answer them, and the host takes them to and fro.

The order of all that is a function of what is drawn: the answers to the turns of one round are put behind their rows
after the next, however long each took. So a run is the same every time, and environments work beside the devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from dppo_jax.data.prompts import PromptStream
from dppo_jax.data.turns import TurnEncoder, turns_of
from dppo_jax.devices import hosts
from dppo_jax.errors import UserError
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.scorer import Pending, Scorer
from dppo_jax.rewards.worker import Outcome
from dppo_jax.rollout import Answers, Dialogs, Finished, OneCall, Told, Work
from dppo_jax.sampling import purpose_key
from dppo_jax.types import PromptBatch
from experiments.run.carried import NAME, Kept, finished_shardings
from experiments.run.rollouts import Calls, conversation, in_chunks, steps_of_call, training_rollout
from experiments.run.runs import Runs
from experiments.run.setup import ROLLOUT

FAULTS = ("", "failed", "killed")  # by number, as `Told.fault` has them: the counts of rewards


class Asked(NamedTuple):
    """Rows whose turns environments are answering, by place and member."""

    rows: list[tuple[int, int]]  # of all hosts
    own: list[tuple[int, int]]  # those that this host asks for
    turns: list[int]  # that each of these has had
    last: list[int]  # its last token
    pending: Pending


class Progress(NamedTuple):
    """How far the rows are, of all hosts."""

    count: Any  # i[D], groups of a shard
    batch: Any  # i[C], which batch of prompts a group came with
    group: Any  # i[C], and its number there
    ended: Any  # bool[C, G]
    over: Any  # bool[C, G]
    tokens_drawn: Any  # i[C, G]
    turns: Any  # i[C, G]


class View(NamedTuple):
    """What the host sees of the rows, in NumPy."""

    there: np.ndarray  # bool[C, 1], places that have a group
    open: np.ndarray  # bool[C, G], rows that can be drawn
    waits: np.ndarray  # bool[C, G], rows that have ended a turn, and are not over
    rows: Progress
    tokens: np.ndarray  # i32[c, G, R], of the places that this host owns
    turn: np.ndarray  # i32[c, G, R], of these: in which turn the policy drew a token


class Conversing:
    """The conversations of one run. Every host has its own rows answered, and all know how far each row is."""

    def __init__(self, runs: Runs, prompts_of: Any, stream: PromptStream, scorer: Scorer):
        setup = runs.base
        self._setup, self._config, self._prompts_of = setup, setup.config, prompts_of
        self._stream, self._scorer, self._text = stream, scorer, setup.text
        data = self._config.data
        self._encoder = TurnEncoder(
            setup.text.tokenizer,
            chat=data.chat,
            eos_ids=setup.text.eos_ids,
            chat_kwargs=data.chat_kwargs.to_dict(),
            date=data.date,
        )
        self._talks = talks = conversation(setup, training_rollout(setup, topk=runs.topk))
        by_row, everywhere = setup.by_row, setup.everywhere
        finished = finished_shardings(setup, told=by_row)
        self._share = hosts.share_over(setup.mesh, talks.places)
        self._local = {place: number for number, place in enumerate(self._share.owned.tolist())}
        self._progress = jax.jit(_progress, out_shardings=everywhere)
        self._kept = Kept(Runs([setup]), talks)
        # Nothing is donated: on a CPU what the host looks at may be the buffer itself.
        self._join = jax.jit(talks.join, out_shardings=by_row)
        arguments, results = (None, by_row, everywhere, everywhere), (by_row, everywhere)
        most = steps_of_call(runs, talks.rollout, talks.places * talks.rollout.group_size)
        self._advance: Calls = OneCall(jax.jit(talks.advance, in_shardings=arguments, out_shardings=results))
        if most:
            stages = talks.begin, talks.rollout.draw, talks.noted
            self._advance = in_chunks(setup, *stages, most, arguments=arguments, results=results)
        self._extend = jax.jit(talks.extend, out_shardings=by_row)
        self._part = jax.jit(talks.part, out_shardings=(by_row, finished))
        self._flight: Dialogs | None = None
        self._joined = 0  # batches of prompts
        self.fault = ""  # why an environment failed in the last step, first of all
        self.counts: dict[str, float] = {}  # what the last step's conversations cost beside `Work`

    def close(self) -> None:
        """Ends the process that renders chat templates."""
        self._encoder.close()

    # --- one step ---

    def start(self, params: Params, step: int) -> Callable[[], Finished]:
        """What a step trains, from whole parameters, once it is called. UserError where the workers cannot do their
        work. What is in flight before the step stays until all is drawn: the rollout may be abandoned."""
        return functools.partial(self._drawn, params, step)

    def _drawn(self, params: Params, step: int) -> Finished:
        flight = self._with_prompts(step)
        key = purpose_key(self._config.seed, ROLLOUT)
        works, refilled, self.fault = [], 0, ""
        asked: Asked | None = None
        view = self._view(flight)
        while not self._is_done(view, step):
            answered, asked, started = asked, None, None
            if view.open.any():
                refilled += int(view.rows.tokens_drawn[view.open].sum())
                started = self._advance.start(params, flight, key, np.int32(step))
            answers = self._answers(answered) if answered else None  # while the devices draw
            if started is not None:
                flight, work = self._advance.finish(started)
                works.append(work)
            view = self._view(flight)
            asked = self._ask(view, answered.rows if answered else [])
            if answers is not None:
                flight = self._extend(flight, answers)
                view = self._view(flight)
        if asked:
            flight = self._extend(flight, self._answers(asked))
        self._flight, finished = self._part(flight, np.int32(step))
        self.counts = {"calls": float(len(works)), "refilled": float(refilled)}
        self.fault = next(filter(None, hosts.everyones(self.fault)), "")
        total: Work = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(works))
        return dataclasses.replace(finished, work=total)

    def _with_prompts(self, step: int) -> Dialogs:
        """What is in flight, and the groups that join it at a step."""
        last = min(step + self._config.rollout.in_flight, self._config.steps - 1)
        flight = self._flight if self._flight is not None else self._kept.empty()
        for batch in range(self._joined, last + 1):
            prompts: PromptBatch = self._prompts_of(batch)
            flight = self._join(flight, prompts, np.int32(batch))
        self._flight, self._joined = flight, last + 1
        return flight

    def _view(self, flight: Dialogs) -> View:
        """Waits until the devices have drawn it."""
        rows = Progress(*jax.device_get(self._progress(flight)))
        tokens, turn = hosts.owned((flight.out.token, flight.turn), self._share)
        there = (np.arange(len(rows.batch) // len(rows.count)) < rows.count[:, None]).reshape(-1, 1)
        return View(there, there & ~rows.ended, there & rows.ended & ~rows.over, rows, tokens, turn)

    def _is_done(self, view: View, step: int) -> bool:
        """Whether every shard has its groups for this step, and those that can wait no longer are over."""
        talks, shards = self._talks, len(view.rows.count)
        complete = view.there[:, 0] & view.rows.over.all(axis=1)
        due = view.there[:, 0] & (view.rows.batch <= step + talks.ahead - talks.max_age)
        enough = complete.reshape(shards, -1).sum(axis=1) >= talks.prompts // shards
        return bool(enough.all() and not (due & ~complete).any())

    def _ask(self, view: View, but: list[tuple[int, int]]) -> Asked | None:
        """Has the workers answer the rows that wait; those of `but` are answered already."""
        answered = set(but)
        waiting = [(place, member) for place, member in np.argwhere(view.waits).tolist()]
        rows = [at for at in waiting if at not in answered]
        if not rows:
            return None
        own = [(place, member) for place, member in rows if place in self._local]
        origin = np.stack([view.rows.batch, view.rows.group], axis=1)[[place for place, _ in own]]
        examples, _ = self._stream.of_groups(origin)
        turns = [int(view.rows.turns[at]) for at in own]
        local = [(self._local[place], member) for place, member in own]
        texts = [
            turns_of(self._text.tokenizer, view.tokens[at], view.turn[at], turns=count, eos_ids=self._text.eos_ids)
            for at, count in zip(local, turns, strict=True)
        ]
        last = [int(view.tokens[here][view.rows.tokens_drawn[at] - 1]) for here, at in zip(local, own, strict=True)]
        return Asked(rows, own, turns, last, self._scorer.submit(cast(list[str], texts), examples))

    def _answers(self, asked: Asked) -> Answers:
        """What the environments said, once they all have, on the devices."""
        c = self._config
        shape = (self._talks.places, c.rollout.group_size)
        text: np.ndarray = np.zeros((*shape, c.rollout.max_new_tokens), np.int32)
        length, fault = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        to, over, truncated = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        score: np.ndarray = np.zeros(shape, np.float32)
        outcomes = asked.pending.outcomes()
        for at, turns, last, outcome in zip(asked.own, asked.turns, asked.last, outcomes, strict=True):
            ids, problem = self._encoded(outcome, last)
            to[at] = True
            if problem or outcome.kind != "scored":
                over[at], fault[at] = True, FAULTS.index("killed" if outcome.kind == "killed" else "failed")
                self.fault = self.fault or problem or outcome.message
                continue
            said = outcome.said
            over[at] = said.terminated or said.truncated or turns >= c.data.max_turns
            truncated[at] = over[at] and not said.terminated
            score[at] = outcome.score
            length[at] = len(ids)
            text[at][: len(ids)] = ids[: text.shape[-1]]
        return self._of_all(Answers(to, text, length, over, truncated, score, fault))

    def _of_all(self, answers: Any) -> Answers:
        """The answers of all hosts, on the devices; of the texts as many columns are sent as any host has."""
        if jax.process_count() == 1:
            return answers
        columns, width = answers.text.shape[-1], max(hosts.everyones(int(answers.length.max())))
        narrow = dataclasses.replace(answers, text=answers.text[..., : min(width, columns)])
        whole = hosts.gather(jax.tree.map(lambda x: x[self._share.owned], narrow), self._share)
        text = np.pad(whole.text, ((0, 0), (0, 0), (0, columns - whole.text.shape[-1])))
        held = jax.tree.map(lambda x: x[self._share.held], dataclasses.replace(whole, text=text))
        return hosts.to_global(held, self._setup.mesh, self._share)

    def _encoded(self, outcome: Outcome, last: int) -> tuple[list[int], str]:
        """The tokens that follow a turn, and why there are none."""
        if outcome.kind != "scored" or outcome.said.terminated or outcome.said.truncated:
            return [], ""
        try:
            return self._encoder(outcome.said.text, outcome.said.role, after=last), ""
        except UserError as error:
            return [], str(error)

    # --- checkpoints ---

    def saved(self) -> dict[str, Any]:
        """What a checkpoint needs of the conversations in flight."""
        return {NAME: self._flight} if self._config.rollout.in_flight else {}

    def shapes(self, held: Any) -> dict[str, Any]:
        """Shapes and shardings of what `saved` gives, or of what a checkpoint has."""
        return self._kept.shapes(held)

    def restore(self, saved: dict[str, Any], step: int) -> None:
        """At a step, from a checkpoint."""
        self._joined = step
        if NAME in saved:
            self._flight, self._joined = self._kept.restored(saved[NAME], step)


def _progress(flight: Dialogs) -> Progress:
    return Progress(
        flight.count, flight.batch, flight.prompts.group, flight.ended, flight.over, flight.tokens_drawn,
        flight.told.turns,
    )  # fmt: skip


class Scored:
    """The scores of conversations, as `Pending` gives those of replies: of the rows that this host owns."""

    def __init__(self, told: Told):
        self._told = told
        self.scored: list[Outcome] = []

    def result(self) -> tuple[np.ndarray, dict[str, int]]:
        """(rewards f32[b], counts)."""
        counts = {kind: int((self._told.fault == number).sum()) for number, kind in enumerate(FAULTS) if kind}
        return np.asarray(self._told.score), counts | {"refused": 0}
