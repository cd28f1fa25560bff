"""The command line of experiments.plot."""

import sys
from collections.abc import Sequence

from dppo_jax.errors import UserError, nearest
from dppo_jax.files import user_path
from experiments.plot.figure import draw, remarks, save
from experiments.plot.runs import group_runs
from experiments.run.cli import Parser

FORMATS = (".png", ".svg", ".pdf")
LONGEST = 10**9  # steps of a moving average
OPTIONS = ("--runs", "--out", "--smooth", "--group", "--tags")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m experiments.plot",
        description="Draws reward, evaluation, mismatch, policy shift, extremes, masked fraction, bad updates, "
        "entropy, length and gradient norm of runs.",
        epilog="Runs whose config.json differs in the seed only are drawn as their mean in its 95% bootstrap interval",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="DIR", help="run folders (a run's --workdir)")
    parser.add_argument("--out", required=True, metavar="F", help="the figure: F.png, F.svg or F.pdf")
    parser.add_argument(
        "--smooth",
        default="1",
        metavar="W",
        help="5: centred mean over 5 steps; 0.9: exponential mean, 0.9 of it the past; default 1: none",
    )
    parser.add_argument(
        "--group", metavar="KEY", help="the config key that names the curves; default loss.name, or a sweep's method"
    )
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="draw these instead; 'region/*/masked'")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}{nearest(unknown[0], OPTIONS)}")
    out = user_path(args.out, "--out")
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {args.out!r} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    smooth = smoothing(args.smooth)
    curves = group_runs([str(user_path(folder, "--runs")) for folder in args.runs], args.group)
    figure = draw(curves, smooth, args.tags)
    for sentence in remarks(curves, args.tags):
        print(sentence, file=sys.stderr)
    save(figure, out, dpi=150)
    print(f"wrote {out}")


def smoothing(text: str) -> float:
    """The value of --smooth: a whole number of steps, or a fraction."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 < value < 1 or (1 <= value <= LONGEST and value.is_integer())):
        raise UserError(f"--smooth must be a whole number of steps or a fraction between 0 and 1, not {text!r}")
    return value
