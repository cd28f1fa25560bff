"""Training against rollout at equal parameters: the paper's Figure 2 for any config, and the noise floor.

    python -m experiments.questions.mismatch --config configs/quickstart.py --out DIR [--config.rollout.activations=m4]

Draws one batch, and scores it by the training pass at the same parameters: the ratio π/μ and |π − μ| of every token
against its probability. The floor is the training pass against itself in microbatches of twice the size. Writes
DIR/mismatch.json and .png.
"""

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from dppo_jax.errors import run_main
from dppo_jax.files import Path, make_folder, write_text
from experiments.plot import save
from experiments.probe import Probe
from experiments.run import cli

BINS = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0)


def measure(config: ConfigDict) -> dict[str, np.ndarray]:
    """Per token, flat: mu, pi, pi in microbatches of twice the size, and the exact divergences."""
    with Probe(config) as probe:
        params = probe.state().params
        batch, lengths, prompts = probe.draw(params)
        at_rollout = probe.see(params, params, batch, lengths, prompts)
        doubled = probe.setup.pack_shape._replace(rows=2 * probe.setup.pack_shape.rows)
        again = probe.see(params, params, batch, lengths, prompts, doubled)
    mask = np.asarray(batch.mask)
    return {
        "mu": np.exp(np.asarray(batch.behavior_logp)[mask]),
        "pi": np.exp(at_rollout.logp[mask]),
        "again": np.exp(again.logp[mask]),
        "tv": at_rollout.tv[mask],
        "kl": at_rollout.kl[mask],
    }


def summary(tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means and largest values of |pi - mu|, the ratio by bins of mu, exact divergences, and the floor."""
    diff, ratio = np.abs(tokens["pi"] - tokens["mu"]), tokens["pi"] / np.maximum(tokens["mu"], 1e-30)
    bins = np.clip(np.digitize(tokens["mu"], BINS) - 1, 0, len(BINS) - 2)
    floor = np.abs(tokens["again"] - tokens["pi"])
    by_bin = {}
    for b, (low, high) in enumerate(zip(BINS, BINS[1:], strict=False)):
        in_bin = bins == b
        if in_bin.any():
            numbers = {"tokens": int(in_bin.sum()), "abs_prob_diff_mean": float(diff[in_bin].mean())}
            numbers |= {"log_ratio_std": float(np.std(np.log(ratio[in_bin]))), "ratio_max": float(ratio[in_bin].max())}
            by_bin[f"{low:g}-{high:g}"] = numbers
    return {
        "tokens": len(diff),
        "abs_prob_diff_mean": float(diff.mean()),
        "abs_prob_diff_max": float(diff.max()),
        "exact_tv_mean": float(tokens["tv"].mean()),
        "exact_kl_mean": float(tokens["kl"].mean()),
        "floor_abs_prob_diff_mean": float(floor.mean()),
        "floor_abs_prob_diff_max": float(floor.max()),
        "by_probability": by_bin,
    }


def draw(tokens: dict[str, np.ndarray], result: dict[str, Any], path: Path) -> None:
    """The two panels of Figure 2."""
    figure, (ratio_axis, diff_axis) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    ratio_axis.semilogy(tokens["mu"], tokens["pi"] / np.maximum(tokens["mu"], 1e-30), ".", ms=2, alpha=0.4)
    ratio_axis.axhline(1, color="k", lw=0.8)
    ratio_axis.set(xlabel="μ, probability at the rollout", ylabel="π / μ")
    diff_axis.plot(tokens["mu"], np.abs(tokens["pi"] - tokens["mu"]), ".", ms=2, alpha=0.4)
    diff_axis.axhline(result["floor_abs_prob_diff_mean"], color="r", lw=0.8, label="training against itself, mean")
    diff_axis.set(xlabel="μ, probability at the rollout", ylabel="|π − μ|")
    diff_axis.legend()
    figure.suptitle(f"{result['tokens']} tokens, mean |π − μ| {result['abs_prob_diff_mean']:.2e}")
    save(figure, path)
    plt.close(figure)


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {"--out": dict(type=Path, required=True, metavar="DIR", help="where the figure goes")},
    )
    tokens = measure(config)
    result = summary(tokens)
    make_folder(arguments.out)
    write_text(arguments.out / "mismatch.json", json.dumps(result, indent=1) + "\n")
    draw(tokens, result, arguments.out / "mismatch.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_main(main)
