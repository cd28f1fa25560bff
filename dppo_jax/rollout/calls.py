"""A rollout as the host calls it: in one call, or in several, between which it may be abandoned."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from dppo_jax.rollout.rollout import Begun
from dppo_jax.rollout.slots import Slots


class Abandoned(Exception):
    """A rollout was given up before or between its calls. It is a function of its arguments, and can be drawn again."""


class OneCall:
    """A compiled rollout. asked: called before it, whether to abandon it."""

    def __init__(self, call: Callable[..., Any], *, asked: Callable[[], bool] = lambda: False):
        self._call, self._asked = call, asked

    def __call__(self, *arguments: Any) -> Any:
        return self.finish(self.start(*arguments))

    def start(self, *arguments: Any) -> Any:
        """Has the devices draw, and waits for nothing: what `finish` takes. Abandoned."""
        if self._asked():
            raise Abandoned
        return self._call(*arguments)

    def finish(self, started: Any) -> Any:
        """The result."""
        return started


@dataclasses.dataclass
class Started:
    """A rollout under way. Who finishes it takes it apart."""

    arguments: tuple[Any, ...]
    begun: Begun | None
    state: Slots | None
    more: jax.Array  # whether there is more to draw


class InChunks:
    """begin(*arguments), draw(begun, state, most) until all is drawn, and end(*arguments, begun, state), as of
    `Rollout`: `most` decode steps a call, to the bit what one call gives.

    asked: called between two calls, whether to abandon it; of several processes all must be told the same.
    arguments, results: shardings of what begin takes and end gives (None: any). everywhere: of what all devices have.
    """

    def __init__(
        self,
        begin: Callable[..., tuple[Begun, Slots]],
        draw: Callable[[Begun, Slots, int], tuple[Slots, jax.Array]],
        end: Callable[..., Any],
        *,
        most: int,
        asked: Callable[[], bool],
        arguments: tuple[Any, ...],
        results: Any,
        everywhere: NamedSharding | None,
    ):
        def rollout_begin(*arguments):
            return begin(*arguments)

        def rollout_draw(begun, state):
            return draw(begun, state, most)

        def rollout_end(arguments, begun, state):
            return end(*arguments, begun, state)

        self._begin = jax.jit(rollout_begin, in_shardings=arguments)
        self._rollout_draw, self._everywhere = rollout_draw, everywhere
        self._draw: Callable[..., tuple[Slots, jax.Array]] | None = None
        self._end = jax.jit(rollout_end, in_shardings=(arguments, None, None), out_shardings=results)
        self._asked = asked

    def __call__(self, *arguments: Any) -> Any:
        return self.finish(self.start(*arguments))

    def start(self, *arguments: Any) -> Started:
        """Has the devices begin, and waits for nothing: what `finish` takes."""
        begun, state = self._begin(*arguments)
        if self._draw is None:
            # The state is laid out as it was: the same program takes it again, in the same memory.
            same = jax.tree.map(lambda x: x.sharding, state)
            shardings = same, self._everywhere
            self._draw = jax.jit(self._rollout_draw, donate_argnums=1, out_shardings=shardings)
        return Started(arguments, begun, *self._draw(begun, state))

    def finish(self, started: Started | None) -> Any:
        """The result, once all is drawn. Abandoned."""
        assert started is not None
        begun, state, more = started.begun, started.state, started.more
        started.begun = started.state = None
        assert self._draw is not None and begun is not None and state is not None
        while bool(more):
            if self._asked():
                raise Abandoned
            state, more = self._draw(begun, state)
        # What the end does not read makes room for it.
        waiting = dataclasses.replace(begun.waiting, prompts=None)
        begun = dataclasses.replace(begun, published={}, waiting=waiting)
        return self._end(started.arguments, begun, dataclasses.replace(state, cache=None, table=None))
