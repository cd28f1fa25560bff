"""How far binary and top-K divergences fall below the exact one, and how often that changes a mask.

    python -m experiments.questions.estimates --config configs/quickstart.py --out DIR [--updates 16] [--config.a.b=v]

Draws one batch, trains on it for some updates, and looks at every token again: the exact divergence of the policy from
the one that drew the batch, and its estimates. Writes DIR/estimates.json, .md and .png.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from dppo_jax.divergences import binary_kl, binary_tv, sampled_in_topk, topk_kl, topk_tv
from dppo_jax.errors import run_main
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.types import TopKPair
from experiments.plot import save
from experiments.probe import Probe
from experiments.run import cli

TOPK = (1, 5, 20, 100)
ORDER = ("exact", "binary", *(f"top-{count}" for count in TOPK))
BINS = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)  # of mu, the behavior probability of the sampled token


def measure(config: ConfigDict, updates: int) -> dict[str, Any]:
    """Per token, flat over the batch: mu, A, whether it moves away, the exact divergences, and every estimate."""
    with Probe(config, topk=max(TOPK)) as probe:
        state = probe.state()
        behavior = state.params
        batch, lengths, prompts = probe.draw(behavior)
        update, count, state = probe.update(), 0, probe.state()  # updates donate their state: the behavior's stays
        while count < updates:
            for index in probe.setup.minibatches(count):
                if count < updates:
                    state, _ = update(state, batch, probe.plan(index, lengths, prompts))
                    count += 1
        measured = probe.see(state.params, behavior, batch, lengths, prompts)
    mask = np.asarray(batch.mask)
    logp, mu = measured.logp, np.asarray(batch.behavior_logp)
    tokens: dict[str, Any] = {
        "mu": np.exp(mu),
        "advantage": np.broadcast_to(np.asarray(batch.advantages)[:, None], mask.shape),
        "up": logp > mu,
        "down": logp < mu,
        "tv": {"exact": measured.tv, "binary": np.asarray(binary_tv(logp, mu))},
        "kl": {"exact": measured.kl, "binary": np.asarray(binary_kl(logp, mu))},
    }
    assert measured.topk_logp is not None and batch.topk_ids is not None and batch.topk_behavior_logp is not None
    for k in TOPK:
        if k <= measured.topk_logp.shape[-1]:
            pair = TopKPair(
                logp=jnp.asarray(measured.topk_logp[..., :k]),
                behavior_logp=batch.topk_behavior_logp[..., :k],
                has_sampled=sampled_in_topk(batch.tokens, batch.topk_ids[..., :k]),
            )
            tokens["tv"][f"top-{k}"] = np.asarray(topk_tv(jnp.asarray(logp), jnp.asarray(mu), pair))
            tokens["kl"][f"top-{k}"] = np.asarray(topk_kl(jnp.asarray(logp), jnp.asarray(mu), pair))
    return jax.tree.map(lambda x: x[mask], tokens)


def masked(tokens: dict[str, Any], divergence: np.ndarray, delta: float) -> np.ndarray:
    """DPPO's decision: moving away, and beyond delta."""
    away = ((tokens["advantage"] > 0) & tokens["up"]) | ((tokens["advantage"] < 0) & tokens["down"])
    return away & (divergence > delta)


def share(estimate: np.ndarray, exact: np.ndarray, where: np.ndarray) -> float | None:
    """Of the exact divergence's sum, what the estimate sees; None of no tokens."""
    return float(estimate[where].sum() / max(exact[where].sum(), 1e-30)) if where.any() else None


def summary(config: ConfigDict, tokens: dict[str, Any]) -> dict[str, Any]:
    """Of both divergences: means, the share of the exact one that an estimate sees, and flipped decisions."""
    has_advantage = tokens["advantage"] != 0
    bins = np.clip(np.digitize(tokens["mu"], BINS) - 1, 0, len(BINS) - 2)
    count = int(has_advantage.sum())
    result: dict[str, Any] = {"tokens": len(has_advantage), "tokens with A != 0": count, "bins of mu": BINS}
    for kind in ("tv", "kl"):
        delta = float(config.loss_defaults[f"dppo_exact_{kind}"].delta_high)
        exact = tokens[kind]["exact"]
        # Beside the paper's threshold, one that a tenth of these tokens pass: a small policy hardly passes the first.
        thresholds = {"paper": delta, "0.9-quantile": float(np.quantile(exact, 0.9))}
        result[kind] = {"thresholds": thresholds, "estimates": {}}
        truth = {name: masked(tokens, exact, value) for name, value in thresholds.items()}
        for name in (name for name in ORDER if name in tokens[kind]):
            estimate = tokens[kind][name]
            row: dict[str, Any] = {
                "mean": float(estimate.mean()),
                "share of exact": float(estimate.mean() / max(exact.mean(), 1e-30)),
                "share by bin": [share(estimate, exact, bins == b) for b in range(len(BINS) - 1)],
                "above exact by at most": float(np.max(estimate - exact)),
            }
            for label, value in thresholds.items():
                decision = masked(tokens, estimate, value)
                flips = (decision != truth[label])[has_advantage]
                row[f"masked at {label}"] = float(decision[has_advantage].mean())
                row[f"flipped at {label}"] = float(flips.mean())
                row[f"missed at {label}"] = float(flips.sum() / max(truth[label].sum(), 1))
            result[kind]["estimates"][name] = row
    return result


def markdown(result: dict[str, Any]) -> str:
    """The summary as tables."""
    lines = [f"{result['tokens']} tokens, {result['tokens with A != 0']} with A ≠ 0."]
    for kind in ("tv", "kl"):
        thresholds = result[kind]["thresholds"]
        at = ", ".join(f"{name} {value:.3g}" for name, value in thresholds.items())
        lines += ["", f"**{kind.upper()}** (δ: {at})", ""]
        head = ["estimate", "mean", "share of exact"]
        head += [f"{what} at {name}" for name in thresholds for what in ("masked", "flipped")]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name, row in result[kind]["estimates"].items():
            cells = [name, f"{row['mean']:.3g}", f"{row['share of exact']:.3f}"]
            cells += [f"{row[f'{what} at {label}']:.4f}" for label in thresholds for what in ("masked", "flipped")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(tokens: dict[str, Any], result: dict[str, Any], path: Path) -> None:
    """Estimate against exact, and the share that is seen by bins of mu."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    labels = [f"{a:g}–{b:g}" for a, b in zip(BINS, BINS[1:], strict=False)]
    for row, kind in zip(axes, ("tv", "kl"), strict=True):
        exact = tokens[kind]["exact"]
        for name in ("binary", "top-20"):
            if name in tokens[kind]:
                estimate = np.maximum(tokens[kind][name], 1e-8)
                row[0].loglog(np.maximum(exact, 1e-8), estimate, ".", ms=2, alpha=0.4, label=name)
        ends = [1e-8, max(exact.max(), 1e-6)]
        row[0].loglog(ends, ends, "k-", lw=0.8)
        row[0].set(xlabel=f"exact {kind.upper()}", ylabel="estimate")
        row[0].legend()
        for name, numbers in result[kind]["estimates"].items():
            if name != "exact":
                shares = [np.nan if x is None else x for x in numbers["share by bin"]]
                row[1].plot(labels, shares, "o-", label=name)
        row[1].set(xlabel="μ of the sampled token", ylabel="share of the exact divergence", ylim=(0, 1.05))
        row[1].legend(fontsize=8)
    save(figure, path)
    plt.close(figure)


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--out": dict(type=Path, required=True, metavar="DIR", help="where the report goes"),
            "--updates": dict(
                type=cli.whole(0, 100_000), default=16, help="optimizer updates on the batch before it is measured (16)"
            ),
        },
    )
    tokens = measure(config, arguments.updates)
    result = summary(config, tokens) | {"updates": arguments.updates}
    make_folder(arguments.out)
    write_text(arguments.out / "estimates.json", json.dumps(result, indent=1) + "\n")
    write_text(arguments.out / "estimates.md", markdown(result))
    draw(tokens, result, arguments.out / "estimates.png")
    print(markdown(result), end="")


if __name__ == "__main__":
    run_main(main)
