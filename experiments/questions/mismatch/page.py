"""The mismatch report as a page, for an issue, and as a figure."""

import os
import subprocess
from importlib import metadata
from typing import Any

import jax
import jaxlib
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import dppo_jax
from dppo_jax.files import Path
from experiments.plot import save
from experiments.probe import Probe
from experiments.questions.mismatch import findings
from experiments.questions.mismatch.passes import training_temperature
from experiments.run.setup import Setup

CACHE = "cache"


def sides(probe: Probe, training: Setup) -> dict[str, tuple[str, str]]:
    """What decides the arithmetic of the rollout and of training."""
    c, rollout = training.config, probe.rollout
    own = probe.setup.config.rollout
    plain = "as they are"
    quantized = own.quantize + ", their inputs too" * own.quantize_activations
    attention = training.attention(dtype=c.policy.dtype, length=training.pack_shape.length).name
    cache = f"pages, read by {rollout.paged_attention}" if rollout.paged else "blocks"
    replay = {"experts": ("recorded", "the rollout's")} if own.router_replay else {}
    return {
        "dtype": (own.dtype, c.policy.dtype),
        "weights": (f"rounded to {own.weights}" if own.weights else plain, plain),
        "inputs of linear layers": (f"rounded to {own.activations}" if own.activations else plain, plain),
        "matrices": (f"quantized to {quantized}" if quantized else plain, plain),
        "attention": (rollout.attention, attention),
        CACHE: (cache, "none"),
        "temperature": (f"{own.temperature:g}", f"{training_temperature(training):g}"),
        "float32 head": (str(probe.setup.config.policy.head_float32), str(c.policy.head_float32)),
        **replay,
    }


def versions() -> dict[str, str]:
    """Of what computes. The commit, where dppo_jax is a checkout; "-dirty" where files of it were changed."""
    device = jax.devices()[0]
    found = {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "dppo_jax": metadata.version("dppo_jax"),
    }
    root = os.path.dirname(os.path.dirname(os.path.abspath(dppo_jax.__file__)))

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if git("rev-parse", "--show-prefix") == "":
            found["commit"] = git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or no checkout
    return found


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows), ""]


def _bins(head: str, bins: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{b['tokens']:,}", *(f"{b[kind][key]:.1e}" for kind in ("tv", "kl") for key in ("mean", "99%", "max"))]
        + [f"{b['abs_prob_diff_mean']:.1e}", f"{b['log_ratio_std']:.1e}"]
        for name, b in bins.items()
    ]
    divergences = [f"{kind}, {key}" for kind in ("TV", "KL") for key in ("mean", "99%", "max")]
    return _table([head, "tokens", *divergences, "\\|π − μ\\|, mean", "log π/μ, deviation"], rows)


def markdown(result: dict[str, Any]) -> str:
    """The page of `__main__.summary`'s numbers."""
    lines = ["# Training against rollout at equal parameters", ""]
    sentences = [_configured(result["sides"]), *result["where"], result["verdict"]]
    lines += [*(f"- {sentence}" for sentence in sentences), ""]
    lines += ["## What was compared", "", f"{result['tokens']:,} response tokens of one batch. {result['model']}.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".", ""]
    compared = [
        [name, mu, pi, "differs" if mu != pi and name != CACHE else ""] for name, (mu, pi) in result["sides"].items()
    ]
    lines += _table(["", "rollout (μ)", "training (π)", ""], compared)
    lines += ["## How far apart", "", "TV and KL(μ‖π), in nats, are of the whole vocabulary.", ""]
    rows = [["TV", result["tv"]], ["KL", result["kl"]], ["\\|π − μ\\|", result["abs_prob_diff"]]]
    rows += [["floor: \\|π − π\\|, microbatches of twice the rows", result["floor"]]]
    lines += _table(
        ["", "mean", "99%", "max"], [[name, *(f"{x:.1e}" for x in values.values())] for name, values in rows]
    )
    lines += [
        f"The rollout recorded probabilities {result['decoding']:.1e} away from those of its arithmetic in one pass.",
        "",
    ]
    lines += _bins("position in the response", result["by_position"]) + _bins(
        "μ of the token", result["by_probability"]
    )
    lines += [
        "## By layer",
        "",
        "Relative difference of the states of the same tokens, mean over tokens.",
        "",
    ]
    layers = [[name, *(f"{x:.1e}" for x in values)] for name, values in result["by_layer"].items()]
    lines += _table(["state", "all tokens", "first tokens", "last quarter of positions"], layers)
    logits = result["logits"]
    lines += [
        f"Logits differ by {logits['relative']:.1e}. The rollout's are {logits['factor']:.6g} times training's, up to "
        f"{logits['rest']:.1e}.",
        "",
    ]
    return "\n".join(lines + _regions(result["regions"]))


def _configured(both_sides: dict[str, tuple[str, str]]) -> str:
    """What differs by the config, in a sentence; training has no cache to differ in."""
    differing = [f"{name} ({mu}, {pi})" for name, (mu, pi) in both_sides.items() if mu != pi and name != CACHE]
    return f"By the config, rollout and training differ in {', '.join(differing) or 'nothing'}."


def _regions(regions: dict[str, Any]) -> list[str]:
    lines = ["## Outside each region before any update", ""]
    lines += [f"Of the {regions['tokens']:,} tokens with A≠0; numbers of the regions are the config's.", ""]
    by_loss = sorted(regions["by_loss"].items(), key=lambda item: -item[1][0])
    rows = [
        [f"`{name}`", "the recomputed policy" if recomputed else "μ", findings.percent(outside)]
        for name, (outside, recomputed) in by_loss
        if outside
    ]
    lines += _table(["loss", "region around", "outside"], rows) if rows else []
    inside = [name for name, (outside, recomputed) in by_loss if not outside and not recomputed]
    recomputed = [name for name, (outside, recomputed) in by_loss if not outside and recomputed]
    for title, names in (
        ("None outside", inside),
        ("None outside, around the recomputed policy", recomputed),
        ("No region", regions["without"]),
    ):
        lines += [f"{title}: {', '.join(f'`{name}`' for name in names)}.", ""] if names else []
    lines += ["Left out:", ""] if regions["left_out"] else []
    lines += [f"- `{name}`: {reason}" for name, reason in regions["left_out"].items()]
    lines += [""] if regions["left_out"] else []
    limits = [findings.percent(x) for x in (findings.LIVES, findings.DIES, findings.DIES_EVERYWHERE)]
    lines += [
        f"In the survival map (experiments/questions/survival), runs lived with {limits[0]} of the tokens outside a "
        f"region around μ; with {limits[1]} they died from some learning rate on, and with {limits[2]} at every one.",
        "",
    ]
    return lines


def draw(tokens: dict[str, np.ndarray], result: dict[str, Any], path: Path) -> None:
    """The two panels of the paper's Figure 2, the states by layer, and TV by position."""
    figure, ((ratio, diff), (layers, position)) = plt.subplots(2, 2, figsize=(10, 7.5), constrained_layout=True)
    ratio.semilogy(tokens["mu"], tokens["pi"] / np.maximum(tokens["mu"], 1e-30), ".", ms=2, alpha=0.4)
    ratio.axhline(1, color="k", lw=0.8)
    ratio.set(xlabel="μ, probability at the rollout", ylabel="π / μ")
    diff.plot(tokens["mu"], np.abs(tokens["pi"] - tokens["mu"]), ".", ms=2, alpha=0.4)
    diff.axhline(result["floor"]["mean"], color="r", lw=0.8, label="training against itself, mean")
    diff.set(xlabel="μ, probability at the rollout", ylabel="|π − μ|")
    diff.legend()
    values = [max(row[0], findings.FLOOR / 100) for row in result["by_layer"].values()]
    layers.semilogy(range(-1, len(values) - 1), values, "o-", ms=4)
    layers.axhline(findings.FLOOR, color="r", lw=0.8, label="rounding of float32")
    layers.set(xlabel="layer (−1: embedding; last: final norm)", ylabel="relative difference of states")
    layers.xaxis.get_major_locator().set_params(integer=True)
    layers.legend()
    position.plot(tokens["position"], tokens["tv"], ".", ms=2, alpha=0.4)
    position.set(xlabel="position in the response", ylabel="total variation")
    figure.suptitle(f"{result['tokens']} tokens, mean |π − μ| {result['abs_prob_diff_mean']:.2e}")
    save(figure, path)
    plt.close(figure)
