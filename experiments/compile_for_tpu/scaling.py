"""What a pod exchanges and holds as it grows, with as many tokens a chip: compiled, not run.

    python -m experiments.compile_for_tpu.scaling --config configs/paper/dense_base.py --out DIR [--layers 2]

The update is compiled for v5p pods of 16 to 1,024 chips. Prompts grow with the pod; mesh.tensor and mesh.expert stay,
mesh.fsdp takes what fits into 64 chips and mesh.data the rest. Writes DIR/scaling.md and DIR/scaling.png.
"""

from experiments.compile_for_tpu.__main__ import compile_all  # first: it sets jax up

# isort: split
import dataclasses

from dppo_jax.errors import run_main
from dppo_jax.files import Path, make_folder, write_text
from experiments.plot import save
from experiments.run import cli
from experiments.trace import model_config

TOPOLOGIES = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8", 1024: "v5p:8x8x16"}
GIB = 2**30


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--out": dict(type=Path, required=True, metavar="DIR", help="where the table and the figure go"),
            "--layers": dict(type=cli.whole(1, 1000), metavar="N", help="of a model otherwise the same: quicker"),
        },
    )
    model = model_config(config)
    if arguments.layers:
        model = dataclasses.replace(model, num_layers=arguments.layers)
    prompts, batch = config.rollout.prompts, config.mesh.fsdp * config.mesh.data * config.mesh.expert
    rows = []
    for chips, topology in TOPOLOGIES.items():
        shards = chips // config.mesh.tensor // config.mesh.expert
        config.mesh.fsdp = min(shards, 64 // config.mesh.tensor // config.mesh.expert)
        config.mesh.data = shards // config.mesh.fsdp
        config.rollout.prompts = prompts * shards * config.mesh.expert // batch
        config.eval.prompts = shards * config.mesh.expert
        step_facts = compile_all(config, model, topology, ("train",))[0]
        rows.append((chips, dict(config.mesh), step_facts))
    make_folder(arguments.out)
    write_text(arguments.out / "scaling.md", table(rows))
    plot(rows, arguments.out / "scaling.png")
    print(table(rows))


def received(step_facts: dict) -> float:
    """GiB that reach each chip in one minibatch."""
    return sum(c["bytes"] for c in step_facts["collectives"]) / GIB


def table(rows) -> str:
    """Markdown, one row a pod."""
    lines = [
        "| chips | data x fsdp x tensor x expert | GiB received a chip | peak GiB | predicted s | exchanges s |",
        "|---|---|---|---|---|---|",
    ]
    for chips, mesh, step_facts in rows:
        sizes = " x ".join(str(mesh[axis]) for axis in ("data", "fsdp", "tensor", "expert"))
        lines.append(
            f"| {chips:,} | {sizes} | {received(step_facts):.1f} | {step_facts['peak_gib']:.2f} | "
            f"{step_facts['predicted_seconds']:.2f} | {step_facts['exchange_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, path: Path) -> None:
    """Bytes and memory against chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    chips = [row[0] for row in rows]
    for axis, values, label in (
        (axes[0], [received(row[2]) for row in rows], "GiB received by a chip, a minibatch"),
        (axes[1], [row[2]["peak_gib"] for row in rows], "peak GiB of a chip"),
    ):
        axis.plot(chips, values, marker="o")
        axis.set(xscale="log", xlabel="chips", ylabel=label, ylim=(0, 1.15 * max(values)))
        axis.set_xticks(chips, [f"{n:,}" for n in chips])
        axis.minorticks_off()
    save(figure, path, dpi=150)


if __name__ == "__main__":
    run_main(main)
