"""Gives the readers of configs, data, models, checkpoints, environments and logs inputs that went wrong, and says what
came of each.

    python -m experiments.chaos.inputs --inputs 1000 --out runs/inputs

Each must be taken, and rightly, or be refused in one sentence: no hang, no other error, no wrong success. What failed
is listed with its number: `--first NUMBER --inputs 1` with the same seed and kinds gives that one again. OUT has the
report (inputs.json, inputs.md), and the exit status is 1 where anything failed. Run it in the project's folder.
"""

import json
import sys

from dppo_jax.errors import UserError, nearest, run_main
from dppo_jax.files import Path, make_folder, to_path, write_text
from experiments.chaos.inputs.trials import KINDS, Result, results
from experiments.run import cli


def report(found: list[Result], kinds: list[str], flags: str) -> dict:
    """Counts by kind, and the failures."""
    counts = {kind: dict(inputs=0, refused=0, taken=0, failed=0) for kind in kinds}
    for one in found:
        counts[one.kind]["inputs"] += 1
        counts[one.kind][one.outcome] += 1
    failures = [
        {"kind": one.kind, "number": one.number, "what": one.what, "again": f"{flags} --first {one.number} --inputs 1"}
        for one in found
        if one.outcome == "failed"
    ]
    return {"counts": counts, "failures": failures}


def markdown(of: dict) -> str:
    """A row a kind, and what failed."""
    lines = ["| kind | inputs | refused | taken | failed |", "|---|---|---|---|---|"]
    for kind, count in of["counts"].items():
        lines.append(f"| {kind} | {count['inputs']} | {count['refused']} | {count['taken']} | {count['failed']} |")
    for one in of["failures"]:
        lines += ["", f"- {one['kind']} {one['number']} (`{one['again']}`): {one['what']}"]
    return "\n".join(lines) + "\n"


def kinds(text: str) -> list[str]:
    """The `type` of --kinds."""
    found = cli.by_commas()(text)
    for kind in found:
        if kind not in KINDS:
            raise UserError(f"--kinds has no {kind!r}{nearest(kind, KINDS)}")
    return found


def main() -> None:
    about = __doc__.split("\n\n")[0].replace("\n", " ")
    parser = cli.Parser(prog="python -m experiments.chaos.inputs", description=about, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder for the report; must be new")
    parser.add_argument("--inputs", type=cli.whole(1, 10**7), default=1000, metavar="N", help="how many (1000)")
    parser.add_argument("--seed", type=cli.whole(0, 2**31 - 1), default=0, metavar="N", help="of what is changed (0)")
    parser.add_argument("--first", type=cli.whole(0, 10**7), default=0, metavar="N", help="number to begin with (0)")
    parser.add_argument("--kinds", type=kinds, metavar="NAMES", help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument("--jobs", type=cli.whole(1, 256), default=2, metavar="N", help="processes (2)")
    arguments = parser.parse_args()
    chosen, out = arguments.kinds or list(KINDS), arguments.out
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder")
    if not to_path("configs/quickstart.py").exists():
        raise UserError("experiments.chaos.inputs reads configs/ and assets/: run it in the project's folder")
    make_folder(out)
    numbers = range(arguments.first, arguments.first + arguments.inputs)
    found = results(chosen, numbers, arguments.seed, arguments.jobs, out)
    of = report(found, chosen, f"--seed {arguments.seed} --kinds {','.join(chosen)}")
    write_text(out / "inputs.json", json.dumps(of, indent=1) + "\n")
    write_text(out / "inputs.md", markdown(of))
    print(markdown(of), end="")
    if of["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
