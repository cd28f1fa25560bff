"""Compiles a config for a TPU pod without one: does it fit, what does it exchange, how fast should it be?

    python -m experiments.compile_for_tpu --config configs/paper/dense_base.py --topology v5p:4x4x4 [--json F] \\
        [--lengths lognormal:2000:1]

Needs libtpu (`make libtpu`) and no TPU. The update, the prefill and one decode step are compiled for the config's mesh
over the topology, with every prompt and response as long as it may be. Times are estimates: the compiler's cycles,
each loop's counted by its trips, with attention and grouped products at the chip's full rate and exchanges overlapped.
With --lengths also a whole rollout, and the run, at response lengths of a distribution, or of a run that has been.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

LIBTPU = Path("build/libtpu")  # where `make libtpu` puts it

# Before jax is imported: it runs on the CPU, and libtpu is not to look for chips.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_STDERR_LOG_LEVEL="3")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
if LIBTPU.is_dir():
    sys.path.append(str(LIBTPU.resolve()))

import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from dppo_jax.devices import chips  # noqa: E402
from dppo_jax.errors import UserError, lookup, run_main  # noqa: E402
from dppo_jax.files import make_folder, write_text  # noqa: E402
from dppo_jax.models import ModelConfig  # noqa: E402
from experiments.compile_for_tpu import report, steps, whole_rollout  # noqa: E402
from experiments.compile_for_tpu.lengths import drawn_from  # noqa: E402
from experiments.run import checks, cli  # noqa: E402
from experiments.run.setup import Setup  # noqa: E402
from experiments.trace import beside, model_config  # noqa: E402


def compile_all(
    config: ConfigDict,
    model: ModelConfig,
    topology: str,
    only: tuple[str, ...],
    hlo: Path | None = None,
    lengths: str | None = None,
) -> list[dict[str, Any]]:
    """The facts of every step, and with `lengths` those of a whole rollout of them. UserError for a step that does not
    fit, after the others."""
    chip = chips.of_topology(topology)
    checks.check(config)
    checks.check_length(config, model)
    mesh = steps.mesh_of(config, topology)
    checks.check_mesh(config, mesh, model)
    step_facts, failures = [], []
    if others := beside(Setup(config, model)):
        print(f"not counted: {others}, which the run holds on the chips too")
    for name in only:
        lookup(dict.fromkeys(steps.NAMES), name, "step")
    if lengths is not None:
        drawn_from(lengths, 1, 1)  # refused before anything is compiled
        if missing := [name for name in ("prefill", "decode") if name not in only]:
            raise UserError(f"--lengths needs the step {missing[0]}: add it to --steps")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"jax {jax.__version__}, libtpu {_libtpu_version()}, {topology}: {mesh.size} chips, mesh {sizes}", flush=True)
    with steps.in_force(config, mesh):
        for step in steps.steps(config, model, mesh):
            if step.name not in only:
                continue
            try:
                program, seconds = steps.compiled(step)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) and "Oom" not in str(error):
                    raise
                failures.append(report.too_large(step.name, str(error)))
                continue
            if hlo:
                write_text(hlo / f"{step.name}.txt", program.as_text())
            step_facts.append(report.facts(config, model, step, program, seconds, chip, mesh.size))
            print(report.text(step_facts[-1]), flush=True)
    if failures:
        raise UserError("; ".join(failures))
    if len(step_facts) == 3:
        print(report.whole_run(config, step_facts))
    if lengths is not None:
        step_facts.append(whole_rollout.facts(config, model, mesh, step_facts, chip, lengths))
        print(report.rollout_text(step_facts[-1]))
        if len(step_facts) == 4:
            print(report.run_at_lengths(config, step_facts, whole_rollout.microbatches(config, model, mesh, lengths)))
    return step_facts


def _libtpu_version() -> str:
    from importlib import metadata

    return metadata.version("libtpu")


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--topology": dict(required=True, metavar="CHIP:SHAPE", help="v5p:4x4x4, v6e:8x8, ..."),
            "--json": dict(type=Path, metavar="F", help="write a list with one object per step"),
            "--steps": dict(type=cli.by_commas(), default=steps.NAMES, metavar="S,...", help="only these"),
            "--layers": dict(type=cli.whole(1, 1000), metavar="N", help="of a model otherwise the same: quicker"),
            "--lengths": dict(metavar="L", help="lognormal:MEAN:SIGMA, uniform:A:B or a run's folder: of responses"),
            "--hlo": dict(type=Path, metavar="DIR", help="keep the compiled programs' text"),
        },
    )
    model = model_config(config)
    if arguments.layers:
        model = dataclasses.replace(model, num_layers=arguments.layers)
    if arguments.hlo:
        make_folder(arguments.hlo)
    only = tuple(arguments.steps)
    step_facts = compile_all(config, model, arguments.topology, only, arguments.hlo, arguments.lengths)
    if arguments.json:
        write_text(arguments.json, json.dumps(step_facts, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
