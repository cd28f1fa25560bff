"""Says whether a run's memory, handles and threads grow, from its log.

    python -m experiments.endurance runs/long [--since 500] [--json]

Every step logs them (docs/logs.md, "Of the machine"). Memory is compared by the medians of the first and the last
WINDOW steps that count. Handles and threads grow where even the least number in the second half of them is more than
the median of the first half: a save or a worker that starts has some of its own, and of tensorstore's threads those
that had nothing to do for 20 s end, until there is more to do. The exit status is 1 where memory grew by more than
MOST, or handles or threads grew at all. A run that was started again has another process's numbers from there on:
count from that step.
"""

import json
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path
from dppo_jax.storage.run_log import read_scalars
from experiments.run.cli import Parser, whole

WINDOW = 100  # steps
MOST = 0.01  # of the memory


MEMORY = ("memory/host_gib", "memory/workers_gib")
COUNTS = ("memory/handles", "memory/threads")


class Growth(NamedTuple):
    """Of one tag: its level at first and at last, of counts the median and the least; its growth per 1,000 steps, and
    whether that is flat."""

    first: float
    last: float
    per_1000: float
    flat: bool


def growth(scalars: Mapping[str, tuple[np.ndarray, np.ndarray]], since: int) -> dict[str, Growth]:
    """By tag, from step `since` on. UserError where there are not enough steps for two windows."""
    found = {}
    for tag in (tag for tag in (*MEMORY, *COUNTS) if tag in scalars):
        steps, values = (x[scalars[tag][0] >= since] for x in scalars[tag])
        if len(steps) < 2 * WINDOW:
            enough = len(scalars[tag][0]) >= 2 * WINDOW
            what = f"lower --since to {scalars[tag][0][-2 * WINDOW]}" if enough else "the run is too short"
            raise UserError(f"{len(steps)} steps from {since} on have {tag}, and it takes {2 * WINDOW}: {what}")
        level, window, most = (np.median, WINDOW, MOST) if tag in MEMORY else (np.min, len(steps) // 2, 0.0)
        first, last = float(np.median(values[:window])), float(level(values[-window:]))
        between = float(steps[-window:].mean() - steps[:window].mean())
        found[tag] = Growth(first, last, (last - first) / between * 1000, last <= first * (1 + most))
    if not found:
        raise UserError(f"the log has none of {', '.join((*MEMORY, *COUNTS))}: the run is of an earlier version")
    return found


def table(found: Mapping[str, Growth]) -> str:
    """A line for every tag."""
    lines = [f"{'':<20} {'first':>10} {'last':>10} {'per 1,000 steps':>16}"]
    for tag, own in found.items():
        grows = "" if own.flat else "  grows"
        lines.append(f"{tag:<20} {own.first:>10.4f} {own.last:>10.4f} {own.per_1000:>+16.4f}{grows}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="python -m experiments.endurance", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="DIR", help="a run's folder")
    parser.add_argument("--since", type=whole(0, 10**9), default=500, metavar="N", help="step to count from (500)")
    parser.add_argument("--json", action="store_true", help="an object of tags, in place of a table")
    arguments = parser.parse_args()
    found = growth(read_scalars(arguments.run), arguments.since)
    print(json.dumps({tag: own._asdict() for tag, own in found.items()}, indent=1) if arguments.json else table(found))
    if not all(own.flat for own in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
