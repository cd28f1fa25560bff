"""The conversations of a run: the devices draw turns, reward workers answer them, and the host takes them to and fro.

The order of all that is a function of what is drawn: the answers to the turns of one round are put behind their rows
after the next, however long each took. So a run is the same every time, and environments work beside the devices.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.data.prompts import PromptStream
from dppo_jax.data.turns import TurnEncoder, turns_of
from dppo_jax.devices.sharding import laid_out
from dppo_jax.errors import UserError
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.scorer import Pending, Scorer
from dppo_jax.rewards.worker import Outcome
from dppo_jax.rollout import Answers, Dialogs, Finished, Told, Work
from dppo_jax.sampling import purpose_key
from dppo_jax.types import PromptBatch
from experiments.run.carried import NAME
from experiments.run.rollouts import conversation, training_rollout
from experiments.run.setup import ROLLOUT, Setup

FAULTS = ("", "failed", "killed")  # by number, as `Told.fault` has them: the counts of rewards


class Asked(NamedTuple):
    """Rows whose turns environments are answering, by place and member."""

    rows: list[tuple[int, int]]
    turns: list[int]  # that each row has had
    last: list[int]  # its last token
    pending: Pending


class View(NamedTuple):
    """What the host sees of the rows, in NumPy."""

    there: np.ndarray  # bool[C, 1], places that have a group
    open: np.ndarray  # bool[C, G], rows that can be drawn
    waits: np.ndarray  # bool[C, G], rows that have ended a turn, and are not over
    flight: Dialogs


class Conversing:
    """The conversations of one run, on one host."""

    def __init__(self, setup: Setup, topk: int, prompts_of: Any, stream: PromptStream, scorer: Scorer):
        if jax.process_count() > 1:
            raise UserError("data.kind = 'environment' runs on one host, but there are more: start one process")
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
        self._talks = talks = conversation(setup, training_rollout(setup, topk=topk))
        by_row: Any = setup.by_row
        everywhere: Any = setup.everywhere
        finished = Finished(
            prompts=by_row,
            rollout=by_row,
            age=by_row,
            age_mean=everywhere,
            age_max=everywhere,
            origin=by_row,
            rows_left=everywhere,
            work=everywhere,
            told=by_row,
        )
        length = self._config.data.max_prompt_len
        self._empty = jax.jit(lambda: talks.empty(length), out_shardings=by_row)
        # Nothing is donated: on a CPU what the host looks at may be the buffer itself.
        self._join = jax.jit(talks.join, out_shardings=by_row)
        self._advance = jax.jit(
            talks.advance, in_shardings=(None, by_row, everywhere, everywhere), out_shardings=(by_row, everywhere)
        )
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

    def draw(self, params: Params, step: int) -> Finished:
        """What a step trains, from whole parameters. UserError where the workers cannot do their work."""
        flight = self._with_prompts(step)
        key = purpose_key(self._config.seed, ROLLOUT)
        works, refilled, self.fault = [], 0, ""
        asked: Asked | None = None
        view = self._view(flight)
        while not self._is_done(view, step):
            answered, asked = asked, None
            if view.open.any():
                refilled += int(view.flight.tokens_drawn[view.open].sum())
                flight, work = self._advance(params, flight, key, np.int32(step))
                works.append(work)
            answers = self._answers(answered) if answered else None  # while the devices draw
            view = self._view(flight)
            asked = self._ask(view, answered.rows if answered else [])
            if answers is not None:
                flight = self._extend(flight, answers)
                view = self._view(flight)
        if asked:
            flight = self._extend(flight, self._answers(asked))
        self._flight, finished = self._part(flight, np.int32(step))
        self.counts = {"calls": float(len(works)), "refilled": float(refilled)}
        total: Work = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(works))
        return dataclasses.replace(finished, work=total)

    def _with_prompts(self, step: int) -> Dialogs:
        """What is in flight, and the groups that join it at a step."""
        last = min(step + self._config.rollout.in_flight, self._config.steps - 1)
        flight = self._flight if self._flight is not None else self._empty()
        for batch in range(self._joined, last + 1):
            prompts: PromptBatch = self._prompts_of(batch)
            flight = self._join(flight, prompts, np.int32(batch))
        self._joined = last + 1
        return flight

    def _view(self, flight: Dialogs) -> View:
        """Waits until the devices have drawn it."""
        nothing: Any = None
        tokens = dataclasses.replace(flight.out, logp=nothing, topk_ids=None, topk_logp=None)
        host = jax.device_get(dataclasses.replace(flight, step=nothing, out=tokens))
        shards = self._talks.rollout.shards
        there = (np.arange(len(host.batch) // shards) < host.count[:, None]).reshape(-1, 1)
        return View(there, there & ~host.ended, there & host.ended & ~host.over, host)

    def _is_done(self, view: View, step: int) -> bool:
        """Whether every shard has its groups for this step, and those that can wait no longer are over."""
        talks, shards = self._talks, self._talks.rollout.shards
        complete = view.there[:, 0] & view.flight.over.all(axis=1)
        due = view.there[:, 0] & (view.flight.batch <= step + talks.ahead - talks.max_age)
        enough = complete.reshape(shards, -1).sum(axis=1) >= talks.prompts // shards
        return bool(enough.all() and not (due & ~complete).any())

    def _ask(self, view: View, but: list[tuple[int, int]]) -> Asked | None:
        """Has the workers answer the rows that wait; those of `but` are answered already."""
        answered = set(but)
        waiting = [(place, member) for place, member in np.argwhere(view.waits).tolist()]
        rows = [at for at in waiting if at not in answered]
        if not rows:
            return None
        flight = view.flight
        origin = np.stack([flight.batch, flight.prompts.group], axis=1)[[place for place, _ in rows]]
        examples, _ = self._stream.of_groups(origin)
        turns = [int(flight.told.turns[at]) for at in rows]
        texts = [
            turns_of(
                self._text.tokenizer, flight.out.token[at], flight.turn[at], turns=count, eos_ids=self._text.eos_ids
            )
            for at, count in zip(rows, turns, strict=True)
        ]
        last = [int(flight.out.token[at][flight.tokens_drawn[at] - 1]) for at in rows]
        return Asked(rows, turns, last, self._scorer.submit(cast(list[str], texts), examples))

    def _answers(self, asked: Asked) -> Answers:
        """What the environments said, once they all have."""
        c = self._config
        shape = (self._talks._places, c.rollout.group_size)
        text: np.ndarray = np.zeros((*shape, c.rollout.max_new_tokens), np.int32)
        length, fault = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        to, over, truncated = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        score: np.ndarray = np.zeros(shape, np.float32)
        for at, turns, last, outcome in zip(*asked[:3], asked.pending.outcomes(), strict=True):
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
        return Answers(to, text, length, over, truncated, score, fault)

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

    def shapes(self) -> dict[str, Any]:
        """Shapes and shardings of what `saved` gives."""
        return {NAME: laid_out(jax.eval_shape(self._empty), self._setup.by_row)}

    def restore(self, saved: dict[str, Any], step: int) -> None:
        """At a step, from a checkpoint."""
        self._flight, self._joined = saved.get(NAME), step
        if self._flight is not None:
            self._joined += int(jnp.sum(self._flight.count)) // self._config.rollout.prompts


class Scored:
    """The scores of conversations, as `Pending` gives those of replies."""

    def __init__(self, told: Told):
        self._told = told
        self.scored: list[Outcome] = []

    def result(self) -> tuple[np.ndarray, dict[str, int]]:
        """(rewards f32[B], counts)."""
        counts = {kind: int((self._told.fault == number).sum()) for number, kind in enumerate(FAULTS) if kind}
        return np.asarray(self._told.score), counts | {"refused": 0}
