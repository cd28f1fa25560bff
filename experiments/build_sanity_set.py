"""Makes a training set of the problems that a policy solves sometimes: solvable, and not solved yet.

    python -m experiments.build_sanity_set --config configs/quickstart.py --policy assets/tiny --samples 8 \
        --low 0.1 --high 0.9 --out runs/sanity.parquet

As in the paper's sanity test (2602.04879, section 5), where whatever keeps a policy from a reward of 1 is the
algorithm's fault. The policy answers every problem of the config's `data` so many times, as an evaluation would
(`eval.temperature`, `eval.top_p`, `eval.max_new_tokens`); those stay whose share of right replies is within the bounds,
both included. Killed and started again, it goes on.
"""

import contextlib
import json
import sys
from typing import Any

import numpy as np
import pyarrow
from ml_collections import ConfigDict

from dppo_jax.data.shares import Chosen, choose, table_of
from dppo_jax.devices import peers
from dppo_jax.devices.hosts import is_writer
from dppo_jax.errors import UserError, writing
from dppo_jax.files import Path, is_file, make_folder
from dppo_jax.storage.results import ABOUT, about_of, read_table, write_table
from experiments.eval import evaluated
from experiments.run import cli
from experiments.run.ranges import ROWS

SET = "data"  # what the problems are called as an evaluation set


def build(
    config: ConfigDict, policy: str, *, samples: int, low: float, high: float, out: Path, results: Path | None = None
) -> Chosen:
    """Writes `out`, and `results` (beside it, where none is named) with every reply. UserError."""
    results = out.with_name(f"{out.stem}.results.parquet") if results is None else results
    own = {"samples": samples, "low": low, "high": high}
    _check(config, own, out, results)
    with contextlib.ExitStack() as stack:
        _, evaluation, about = evaluated(_asked(config, samples), stack, policy_name=policy, results=results)
        stream = evaluation.streams[f"eval.sets.{SET}"]
    rewards = read_table(results)["reward"].to_numpy() if is_writer() else np.zeros(len(stream) * samples)
    shares = (rewards.reshape(-1, samples) >= 1.0).mean(axis=1)
    chosen = choose(shares, low, high)
    if is_writer():
        counts = {"kept": len(chosen.kept), "too_hard": chosen.too_hard, "too_easy": chosen.too_easy}
        said = (
            f"{len(chosen.kept)} of {len(stream)} problems kept; {chosen.too_hard} too hard (a share below {low:g}), "
            f"{chosen.too_easy} too easy (above {high:g})"
        )
        if not counts["kept"]:
            raise UserError(f"no problem is within the bounds: {said}; {results} has the replies, for other bounds")
        table, remarks = table_of([stream.examples[number] for number in chosen.kept], shares[chosen.kept])
        provenance = {**about, "sanity_set": {**own, **counts, "data": stream.counts}}
        _write(out, table, provenance)
        print("\n".join(f"{out}: {remark}" for remark in remarks), end="\n" if remarks else "", file=sys.stderr)
        print(f"{out}: {said}")
    return chosen


def _check(config: ConfigDict, own: dict[str, Any], out: Path, results: Path) -> None:
    """UserError for what could not end well, before anything is drawn."""
    if own["low"] > own["high"]:
        raise UserError(f"--low {own['low']:g} is above --high {own['high']:g}: no problem could be kept")
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: the file's name must end in .parquet")
    if out == results:
        raise UserError(f"--out and --results are both {out}: name two files")
    if config.data.verifier == "task":
        raise UserError(
            "data.verifier = 'task' is the scorer of a generated data set, which rows of a file do not have: set "
            "data.verifier to last_number, exact_match or math_verify"
        )
    if not is_writer():
        return
    make_folder(out.parent)
    if is_file(out):
        before = about_of(out).get("sanity_set", {})
        for name, number in own.items():
            if before.get(name) != number:
                raise UserError(f"{out} was made with --{name} {before.get(name)}, not {number}: name another --out")


def _asked(config: ConfigDict, samples: int) -> ConfigDict:
    """The config whose only evaluation set is the training data."""
    config = config.copy_and_resolve_references()
    config.eval.sets = ConfigDict({SET: config.data.copy_and_resolve_references()})
    config.eval.samples, config.eval.every = samples, 0
    return config


def _write(out: Path, table: pyarrow.Table, provenance: dict[str, Any]) -> None:
    with writing(out):
        write_table(out, table.replace_schema_metadata({ABOUT: json.dumps(provenance, allow_nan=False)}))


def share(text: str) -> float:
    """The `type` of a bound."""
    number = cli.not_negative(text)
    if number > 1:
        raise cli.mismatch(text, "at most 1")
    return number


def main() -> None:
    flags: dict[str, dict[str, Any]] = {
        "--policy": dict(required=True, metavar="DIR_OR_HUB", help="a model directory, ORG/NAME or ORG/NAME@REVISION"),
        "--samples": dict(required=True, type=cli.whole(1, ROWS), metavar="N", help="replies to each problem"),
        "--low": dict(type=share, default=0.1, metavar="SHARE", help="the least share of right replies (0.1)"),
        "--high": dict(type=share, default=0.9, metavar="SHARE", help="the largest one (0.9)"),
        "--out": dict(required=True, type=Path, metavar="FILE.parquet", help="the problems that are kept"),
        "--results": dict(type=Path, metavar="FILE.parquet", help="every reply (beside --out), also for other bounds"),
        **peers.FLAGS,
    }
    config, a = cli.parse(__doc__.split("\n")[0], flags, first=peers.join)
    build(config, a.policy, samples=a.samples, low=a.low, high=a.high, out=a.out, results=a.results)


if __name__ == "__main__":
    peers.run_main(main)
