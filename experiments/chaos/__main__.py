"""Kills a run at random instants and disturbs it otherwise, over every kind of state it may have; what came of it.

    python -m experiments.chaos --config configs/quickstart.py --workdir runs/chaos --kills 100

A third of the kills are inside a save, a third inside a rollout; some follow another while the run starts again, some
are SIGTERM in place of SIGKILL, and after some a bit of the newest checkpoint is flipped. The faults are a full disk,
damaged bytes, a clock that is an hour off and a host that is stopped. Every run must go on, lose at most what came
after its last checkpoint, and end with the log of the undisturbed run, bit for bit. Anything else is told, and the exit
status is 1 (docs/checkpoints.md).
"""

import sys
from collections.abc import Iterable

import jax
from jax._src import xla_bridge  # whether a device was touched; jax itself does not show it
from ml_collections import ConfigDict

from dppo_jax.errors import UserError, nearest, run_main
from dppo_jax.files import Path, is_bucket, make_folder, write_text
from experiments.chaos.faults import FAULTS
from experiments.chaos.parts import Part, run_parts
from experiments.chaos.processes import found
from experiments.chaos.report import as_json, markdown
from experiments.chaos.trials import KINDS
from experiments.run import cli
from experiments.run.checks import check

SAVES = 12  # in a run whose config has none before its end


def changed(config: ConfigDict, kind: str) -> ConfigDict:
    """The config of a kind."""
    own = config.copy_and_resolve_references()
    for key, value in KINDS[kind].items():
        section, _, name = key.rpartition(".")
        own[section][name] = value
    if not own.checkpoint.every:
        own.checkpoint.every = max(1, own.steps // SAVES)
    check(own)
    return own


def chosen(flag: str, names: list[str] | None, known: Iterable[str], default: list[str]) -> list[str]:
    """What --kinds or --faults name."""
    for name in names or []:
        if name not in known and names != ["none"]:
            raise UserError(f"{flag} has no {name!r}{nearest(name, known)}")
    return default if names is None else [] if names == ["none"] else names


def share(kills: int, kinds: list[str], kind: str) -> int:
    """Of the kills, those of one kind; the first kinds have one more where they do not come out even."""
    return (kills + len(kinds) - 1 - kinds.index(kind)) // len(kinds) if kind in kinds else 0


def parts_of(arguments, config: ConfigDict) -> list[Part]:
    """A part for each kind that is killed, or has a fault. UserError."""
    kinds = [kind for kind in KINDS if kind != "bucket" or arguments.bucket]
    kinds = chosen("--kinds", arguments.kinds, KINDS, kinds)
    faults = chosen("--faults", arguments.faults, FAULTS, list(FAULTS))
    if "bucket" in kinds and not arguments.bucket:
        raise UserError("the kind bucket needs --bucket, such as gs://mine/chaos")
    parts = []
    for kind in KINDS:
        kills = share(arguments.kills, kinds, kind)
        own = [name for name in faults if FAULTS[name][0] == kind]
        if kills or own:
            folder = arguments.bucket if kind == "bucket" else arguments.workdir / kind
            parts.append(Part(kind, changed(config, kind), folder, arguments.seed, kills, own))
    return parts


def runs_here(part: Part) -> bool:
    """Whether it can run on these devices; where it cannot, this is told."""
    if part.kind != "two_hosts" or found(jax.default_backend) == "cpu":
        return True
    names = ", ".join([part.kind, *part.faults])
    print(f"skipped: {names}: two processes cannot share an accelerator; JAX_PLATFORMS=cpu runs them", file=sys.stderr)
    return False


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each kind; must be new"),
            "--kinds": dict(
                type=cli.by_commas(),
                metavar="NAMES",
                help=f"of {', '.join(KINDS)}, or none (all; bucket with --bucket)",
            ),
            "--faults": dict(
                type=cli.by_commas(), metavar="NAMES", help=f"of {', '.join(FAULTS)}, or none (all)"
            ),
            "--kills": dict(type=cli.whole(0, 100_000), default=10, metavar="N", help="over all kinds (10)"),
            "--seed": dict(type=cli.whole(0, 2**31 - 1), default=0, metavar="N", help="of the instants (0)"),
            "--jobs": dict(type=cli.whole(1, 1000), default=1, metavar="N", help="kinds at once (1)"),
            "--bucket": dict(type=Path, metavar="ADDRESS", help="a folder in a bucket, for the kind bucket"),
        },
    )
    workdir = arguments.workdir
    if is_bucket(workdir):
        raise UserError(f"--workdir {workdir} must be on a disk; --bucket is for the runs of the kind bucket")
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty; name a new folder")
    parts = parts_of(arguments, config)
    if not parts:
        raise UserError("nothing is to be done: --kills is 0, or --kinds none, and --faults none")
    if xla_bridge.backends_are_initialized():
        raise UserError("the config file asks for the devices when it is read, after which no run can be forked")
    parts = [part for part in parts if runs_here(part)]
    if not parts:
        raise UserError("nothing is left to do")
    make_folder(workdir)
    done = []
    for one in run_parts(parts, str(workdir), arguments.jobs):
        done.append(one)
        write_text(workdir / "chaos.json", as_json(done))
        write_text(workdir / "chaos.md", markdown(done))
    print(markdown(done), end="")
    if any(one.failures for one in done):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
