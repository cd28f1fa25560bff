"""Says whether a run's memory, handles and threads grow, from its log.

    python -m experiments.endurance runs/long [--since 500] [--json]

Every step logs them (docs/logs.md, "Of the machine"). Memory is compared by the medians of the first and the last
WINDOW steps that count; handles by the least number in the first and in the second half of them, since a save or a
worker that starts has some of its own. Threads grow where the least number in the second half is more than the median
of the first: tensorstore's end where they have nothing to do, until they have. The exit status is 1 where memory grew
by more than MOST, or handles or threads grew at all. A run that was started again has another process's numbers from
there on: count from that step.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path
from dppo_jax.storage.run_log import read_scalars
from experiments.run.cli import Parser, whole

WINDOW = 100  # steps
MOST = 0.01  # of the memory


class Rule(NamedTuple):
    """What a tag's first and last steps are compared by, how many those are (None: half), and by what share it may
    grow."""

    before: Callable[..., float]
    after: Callable[..., float]
    steps: int | None
    most: float


RULES = {
    "memory/host_gib": Rule(np.median, np.median, WINDOW, MOST),
    "memory/workers_gib": Rule(np.median, np.median, WINDOW, MOST),
    "memory/handles": Rule(np.min, np.min, None, 0.0),
    "memory/threads": Rule(np.median, np.min, None, 0.0),
}


class Growth(NamedTuple):
    """Of one tag: its level at first and at last, its growth per 1,000 steps, and whether that is flat."""

    first: float
    last: float
    per_1000: float
    flat: bool


def growth(scalars: Mapping[str, tuple[np.ndarray, np.ndarray]], since: int) -> dict[str, Growth]:
    """By tag, from step `since` on. UserError where there are not enough steps for two windows."""
    found = {}
    for tag, rule in ((tag, rule) for tag, rule in RULES.items() if tag in scalars):
        steps, values = (x[scalars[tag][0] >= since] for x in scalars[tag])
        if len(steps) < 2 * WINDOW:
            enough = len(scalars[tag][0]) >= 2 * WINDOW
            what = f"lower --since to {scalars[tag][0][-2 * WINDOW]}" if enough else "the run is too short"
            raise UserError(f"{len(steps)} steps from {since} on have {tag}, and it takes {2 * WINDOW}: {what}")
        window = rule.steps or len(steps) // 2
        first, last = float(rule.before(values[:window])), float(rule.after(values[-window:]))
        between = float(steps[-window:].mean() - steps[:window].mean())
        found[tag] = Growth(first, last, (last - first) / between * 1000, last <= first * (1 + rule.most))
    if not found:
        raise UserError(f"the log has none of {', '.join(RULES)}: the run is of an earlier version")
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
