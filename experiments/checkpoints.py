"""Lists the checkpoints of a run: their size, whether every byte is as it was written, and what made them.

    python -m experiments.checkpoints runs/mine [--json]

It moves and writes nothing. The value is that of `checkpoint.best` at the step, from the steps after it or the log.
The exit status is 1 where no step is whole.
"""

import json
import math
import sys
from typing import Any

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path, absolute, files_in, size_of
from dppo_jax.storage.checkpoint import manifest
from dppo_jax.storage.run_log import read_scalars
from experiments.run.cli import Parser


def listed(run: Path) -> list[dict[str, Any]]:
    """Of every step, increasing: step, bytes, damage (None: it is whole), best (a tag's value, or None) and made_by.

    UserError where the run has no checkpoints.
    """
    folder = absolute(run) / "checkpoints"
    if not folder.is_dir():
        above = next((at.parent for at in (run, run.parent) if at.name == "checkpoints"), None)
        which = "the --workdir of experiments.train" if above is None else str(above)
        raise UserError(f"{run} holds no folder checkpoints/; give a run's folder, {which}")
    rows, values, tag = [], dict[str, float](), ""
    for step in manifest.entries(folder).steps:
        at = folder / str(step)
        about, damage = _about(at), manifest.damage(at, step)
        best = about.get("best", {})
        values, tag = values | best.get("values", {}), best.get("tag", tag)
        size = sum(size_of(file) for file in files_in(at))
        rows.append({"step": step, "bytes": size, "damage": damage, "made_by": about.get("made_by", {})})
    values = _logged(run, tag) | values
    return [row | {"best": values.get(str(row["step"]))} for row in rows]


def _logged(run: Path, tag: str) -> dict[str, float]:
    """A tag's values by step, as a run has them in its log; a sweep's folder has none."""
    try:
        steps, values = read_scalars(run).get(tag, ((), ()))
    except UserError:
        return {}
    return {str(step): float(value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)}


def _about(folder: Path) -> dict[str, Any]:
    try:
        return manifest.about(folder)
    except (UserError, OSError):  # told as its damage
        return {}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for every step."""
    lines = [f"{'step':>9} {'MB':>9} {'best':>10}  made by, state"]
    for row in rows:
        best = "-" if row["best"] is None else f"{row['best']:.4g}"
        made = ", ".join(f"{name} {value}" for name, value in row["made_by"].items()) or "it does not say"
        state = f"damaged: {row['damage']}" if row["damage"] else "whole"
        lines.append(f"{row['step']:>9} {row['bytes'] / 1e6:>9.2f} {best:>10}  {made}; {state}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="python -m experiments.checkpoints", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="DIR", help="a run's folder, or a sweep's")
    parser.add_argument("--json", action="store_true", help="a list of objects, in place of a table")
    arguments = parser.parse_args()
    rows = listed(arguments.run)
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    if all(row["damage"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
