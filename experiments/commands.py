"""The commands that an installation has: `dppo-train` is `python -m experiments.train`, and so on (pyproject.toml)."""

import runpy
from functools import partial


def run(module: str) -> None:
    """Runs experiments.MODULE as the program, with the command line as it is."""
    runpy.run_module(f"experiments.{module}", run_name="__main__")


benchmark = partial(run, "benchmark")
build_sanity_set = partial(run, "build_sanity_set")
chaos = partial(run, "chaos")
checkpoints = partial(run, "checkpoints")
compile_for_tpu = partial(run, "compile_for_tpu")
endurance = partial(run, "endurance")
eval = partial(run, "eval")
export = partial(run, "export")
mismatch = partial(run, "questions.mismatch")
plot = partial(run, "plot")
replay = partial(run, "replay")
sft = partial(run, "sft")
sweep = partial(run, "sweep")
train = partial(run, "train")
