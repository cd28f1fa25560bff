"""Kills a run at random instants, over every kind of state that it may have, and says what came of it.

    python -m experiments.chaos --config configs/quickstart.py --workdir runs/chaos --kills 100

A third of the kills are inside a save, a third inside a rollout; some follow another while the run starts again, some
are SIGTERM in place of SIGKILL, and after some a bit of the newest checkpoint is flipped. Every run must go on, lose at
most what came after its last checkpoint, and end with the log of the undisturbed run, bit for bit. Anything else is
told, and the exit status is 1.
"""

import dataclasses
import json
import sys

from ml_collections import ConfigDict

from dppo_jax.errors import UserError, nearest, run_main
from dppo_jax.files import Path, make_folder, to_path, write_text
from experiments.chaos.trials import KINDS, Outcome, trial
from experiments.run import cli
from experiments.run.checks import check


def changed(config: ConfigDict, kind: str) -> ConfigDict:
    """The config of a kind."""
    own = config.copy_and_resolve_references()
    for key, value in KINDS[kind].items():
        section, _, name = key.rpartition(".")
        own[section][name] = value
    check(own)
    return own


def markdown(outcomes: list[Outcome]) -> str:
    """A table, a row a kind, and what failed."""
    lines = [
        "| kind | ended | damaged | went on | steps lost | runs that ended as the undisturbed one, bit for bit | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        ended = ", ".join(f"{count} in {name}" for name, count in sorted(one.ends.items()))
        same = f"{one.rounds - bool(one.failures)} of {one.rounds}"
        lines.append(
            f"| {one.kind} | {ended} | {one.damaged} | {one.resumes} | {one.most_lost} | {same} | {one.seconds:g} |"
        )
    failures = [f"- {one.kind}: {failure}" for one in outcomes for failure in one.failures]
    return "\n".join([*lines, *(["", "**Failures**", "", *failures] if failures else [])]) + "\n"


def kinds(text: str) -> list[str]:
    """The `type` of --kinds."""
    found = cli.by_commas()(text)
    for kind in found:
        if kind not in KINDS:
            raise UserError(f"--kinds has no {kind!r}{nearest(kind, KINDS)}")
    return found


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each kind; must be new"),
            "--kinds": dict(type=kinds, metavar="NAMES", help=f"of {', '.join(KINDS)} (all; bucket with --bucket)"),
            "--kills": dict(type=cli.whole(1, 100_000), default=10, metavar="N", help="over all kinds (10)"),
            "--seed": dict(type=cli.whole(0, 2**31 - 1), default=0, metavar="N", help="of the instants (0)"),
            "--bucket": dict(type=Path, metavar="ADDRESS", help="a folder in a bucket, for the kind bucket"),
        },
    )
    chosen = arguments.kinds or [kind for kind in KINDS if kind != "bucket" or arguments.bucket]
    if "bucket" in chosen and not arguments.bucket:
        raise UserError("the kind bucket needs --bucket, such as gs://mine/chaos")
    configs = {kind: changed(config, kind) for kind in chosen}
    workdir = arguments.workdir
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty; name a new folder")
    make_folder(workdir)
    outcomes = []
    for number, (kind, own) in enumerate(configs.items()):
        share = arguments.kills // len(configs) + (number < arguments.kills % len(configs))
        if not share:
            continue
        print(f"{kind}: {share} kills", file=sys.stderr, flush=True)
        folder = arguments.bucket if kind == "bucket" else to_path(workdir / kind)
        outcomes.append(trial(kind, own, folder, share, arguments.seed, str(workdir / f"{kind}.log")))
        write_text(workdir / "chaos.json", json.dumps([dataclasses.asdict(one) for one in outcomes], indent=1) + "\n")
        write_text(workdir / "chaos.md", markdown(outcomes))
    print(markdown(outcomes), end="")
    if any(one.failures for one in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
