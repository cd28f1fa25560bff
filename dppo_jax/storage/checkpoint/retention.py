"""Which older checkpoints stay beside the newest: every k-th step, and the best by one number of the log."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dppo_jax.errors import UserError, lookup, nearest

BEST_OF = {"max": max, "min": min}
LATER = ("eval/", "sft/held_out")  # tags that the first step of a run that goes on may lack


class Retention:
    """`every`: steps that are multiples of it stay (0: none). `best`: a tag of the log ("": none); of the steps with a
    value of it the one with the largest or smallest (`best_of`) stays, the first of equal ones.

    A step's value is what the log has at that step, which was measured with its parameters. It is known after the step
    was saved: the manifests of later steps hold it. Of several runs it is their mean.
    """

    def __init__(self, *, every: int = 0, best: str = "", best_of: str = "max"):
        self._every, self._tag = every, best
        self._choose = lookup(BEST_OF, best_of, "checkpoint.best_of")
        self._values: dict[int, float] = {}
        self._saved_step: int | None = None
        self._known = False  # whether the tag was found in the log

    def resume(self, step: int, about: Mapping[str, Any]) -> None:
        """Takes what a step's manifest says of earlier steps, where that is of this tag."""
        self._saved_step = step
        of_tag = about.get("best", {})
        if self._tag and of_tag.get("tag") == self._tag:
            self._values = {int(at): value for at, value in of_tag["values"].items()}
            self._known = bool(self._values)

    def saving(self, step: int) -> dict[str, Any]:
        """For the manifest of a step that is saved now."""
        self._saved_step = step
        values = {str(at): value for at, value in self._values.items()}
        return {"best": {"tag": self._tag, "values": values}} if self._tag else {}

    def measured(self, step: int, logged: Sequence[Mapping[str, float]]) -> None:
        """Takes what was logged at a step, by run. UserError where that can never hold the tag."""
        if not self._tag or not any(logged):
            return
        values = [scalars[self._tag] for scalars in logged if self._tag in scalars]
        if not values and not self._known:
            of_kind = self._tag.startswith(LATER)
            tags = {tag for scalars in logged for tag in scalars if not of_kind or tag.startswith(LATER)}
            if tags:
                named = f"checkpoint.best = {self._tag!r}"
                raise UserError(f"{named} is not in the log of this run{nearest(self._tag, tags)}")
        self._known = self._known or bool(values)
        if step == self._saved_step and len(values) == len(logged) and math.isfinite(mean := float(np.mean(values))):
            self._values[step] = mean

    def stays(self, whole: Sequence[int]) -> set[int]:
        """Of the whole steps those that stay, whatever is newer."""
        found = {step for step in whole if self._every and step % self._every == 0}
        if valued := [step for step in whole if step in self._values]:
            found.add(self._choose(valued, key=lambda step: self._values[step]))
        return found
