"""What masks do before any update, where the rollout is rounded: how much they drop, and where the rest points.

    python -m experiments.questions.survival.pull --config configs/studies/pull.py --out DIR [--config.a.b=v]

Pull is sum c sign(mu - pi) / sum |c| over the tokens of some batches at equal parameters: 1 if every coefficient that
is left moves its token's probability to where the rounded rollout has it, 0 if the mismatch and the gradient have
nothing to do with one another.
"""

import json
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dppo_jax.errors import run_main
from dppo_jax.files import Path, make_folder, write_text
from experiments import regions
from experiments.probe import Probe
from experiments.run import cli

LOSSES = ("pg_is", "clip_higher", "clip_unsigned", "minirl", "dppo_binary_tv", "dppo_binary_tv_proximal")


def measure(config: ConfigDict, names: list[str], batches: int) -> dict[str, Any]:
    """By loss: the share of tokens with A != 0 that it masks, and its pull, overall and among those outside a ratio of
    Clip-Higher's bounds."""
    losses = {name: jax.jit(regions.bound(config, name)) for name in names}
    sums: dict[str, np.ndarray] = {name: np.zeros(3) for name in names}
    tokens, gap = 0, 0.0
    with Probe(config, topk=config.rollout.tracked, entropy=True) as probe:
        params = probe.state().params
        for step in range(batches):
            batch, lengths, prompts = probe.draw(params, step)
            inputs = regions.inputs_at_rollout(batch, probe.see(params, params, batch, lengths, prompts))
            logp, mask = inputs.logp, np.asarray(batch.mask)
            counted = regions.has_advantage(inputs)
            towards = np.sign(np.asarray(batch.behavior_logp) - np.asarray(logp))
            tokens += int(counted.sum())
            gap += float(np.abs(np.exp(logp) - np.exp(batch.behavior_logp))[mask].sum()) / mask.sum()
            for name, loss in losses.items():
                output = loss(inputs)
                coef, keep = np.asarray(output.coef), np.asarray(output.keep)
                along, size = (coef * towards)[counted].sum(), np.abs(coef)[counted].sum()
                sums[name] += [(~keep & counted).sum(), along, size]
    by_loss = {
        name: {"masked": round(float(masked / tokens), 5), "pull": round(float(along / size), 4)}
        for name, (masked, along, size) in sums.items()
    }
    return {"tokens with A != 0": tokens, "abs_prob_diff_mean": gap / batches, "losses": by_loss}


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--out": dict(type=Path, required=True, metavar="DIR", help="writes pull.json there"),
            "--losses": dict(type=cli.by_commas(), default=LOSSES, metavar="NAMES", help="by commas"),
            "--batches": dict(type=cli.whole(1, 10_000), default=16, metavar="N", help="of the config's prompts (16)"),
        },
    )
    result = measure(config, arguments.losses, arguments.batches)
    make_folder(arguments.out)
    write_text(arguments.out / "pull.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_main(main)
