"""Training against rollout at equal parameters, as a page for an issue: how far apart they are, and where they part.

    python -m experiments.questions.mismatch --config configs/quickstart.py --out DIR [--config.rollout.activations=m4]

Draws one batch, and scores it by the training pass at the same parameters. The page has what was compared,
full-vocabulary divergences by position and probability, the states of both passes from layer to layer, the noise floor
(training against itself in microbatches of twice the size), and the share of tokens outside each loss's region before
any update. Writes DIR/report.md, mismatch.json and mismatch.png, and prints the page.
"""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from dppo_jax.errors import run_main
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.models.decoder import Params
from dppo_jax.types import TrainBatch
from experiments import regions
from experiments.probe import Measured, Probe
from experiments.questions.mismatch import findings, page, passes
from experiments.run import cli
from experiments.run.setup import Setup

BINS = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0)


Drawn = tuple[TrainBatch, np.ndarray, np.ndarray]  # what `Probe.draw` gives


class Seen(NamedTuple):
    """One batch, by both passes."""

    batch: TrainBatch
    once: Measured
    again: Measured  # in microbatches of twice the rows
    compared: passes.Compared


def see(probe: Probe, drawn: Drawn, params: Params, behavior: Params, training: Setup | None = None) -> Seen:
    """What `probe.draw(behavior)` gave, by the pass of `training` at `params` (None: of the probe's own setup)."""
    training = probe.setup if training is None else training
    doubled = probe.setup.pack_shape._replace(rows=2 * probe.setup.pack_shape.rows)
    once, again = (probe.see(params, behavior, *drawn, shape, training) for shape in (None, doubled))
    return Seen(drawn[0], once, again, passes.compare(probe, training, params, behavior, *drawn))


def by_token(seen: Seen) -> dict[str, np.ndarray]:
    """Flat: mu, pi, pi in microbatches of twice the size, exact divergences, the position in the response from 0."""
    mask = np.asarray(seen.batch.mask)
    return {
        "mu": np.exp(np.asarray(seen.batch.behavior_logp)[mask]),
        "pi": np.exp(seen.once.logp[mask]),
        "again": np.exp(seen.again.logp[mask]),
        "tv": seen.once.tv[mask],
        "kl": seen.once.kl[mask],
        "position": np.broadcast_to(np.arange(mask.shape[1]), mask.shape)[mask],
    }


def divergences(seen: Seen) -> dict[str, Any]:
    """How far pi is from mu, over all tokens and by bins, and from itself."""
    tokens = by_token(seen)
    diff, floor = np.abs(tokens["pi"] - tokens["mu"]), np.abs(tokens["again"] - tokens["pi"])
    doubling = (0, *(2**n for n in range(int(tokens["position"].max()).bit_length() + 1)))
    return {
        "tokens": len(diff),
        "abs_prob_diff_mean": float(diff.mean()),
        "abs_prob_diff_max": float(diff.max()),
        "exact_tv_mean": float(tokens["tv"].mean()),
        "exact_kl_mean": float(tokens["kl"].mean()),
        "floor_abs_prob_diff_mean": float(floor.mean()),
        "floor_abs_prob_diff_max": float(floor.max()),
        "tv": findings.spread(tokens["tv"]),
        "kl": findings.spread(tokens["kl"]),
        "abs_prob_diff": findings.spread(diff),
        "floor": findings.spread(floor),
        "by_probability": findings.in_bins(tokens["mu"], BINS, tokens),
        "by_position": findings.in_bins(tokens["position"], doubling, tokens, whole=True),
    }


def layers(seen: Seen) -> dict[str, Any]:
    """Where the passes part, state by state, and the logits."""
    compared, mask = seen.compared, np.asarray(seen.batch.mask)
    mu = np.asarray(seen.batch.behavior_logp)
    difference, tokens = compared.difference[:, compared.tokens > 0], compared.tokens[compared.tokens > 0]
    late = tokens * (np.arange(len(tokens)) >= 0.75 * (len(tokens) - 1))
    columns = findings.by_state(compared), difference[:, 0], difference @ late / late.sum()
    return {
        "where": findings.where_they_part(compared, mask, mu),
        "decoding": findings.decoding_gap(compared, mask, mu),
        "by_layer": {
            name: [float(column[at]) for column in columns] for at, name in enumerate(findings.names(len(difference)))
        },
        "logits": findings.logit_difference(compared.logits, mask)._asdict(),
    }


def summary(probe: Probe, seen: Seen, training: Setup | None = None) -> dict[str, Any]:
    """All that the page says."""
    training = probe.setup if training is None else training
    found = regions.measure(training.config, regions.inputs_at_rollout(seen.batch, seen.once))
    model = training.model
    size = sum(int(np.prod(shape.shape)) for shape in jax.tree.leaves(training.param_shapes))
    return {
        **layers(seen),
        "verdict": findings.verdict(training.config.loss.name, found),
        **divergences(seen),
        "model": f"{training.config.policy.path}: {model.model_type}, {model.num_layers} layers, {size:,} parameters",
        "versions": page.versions(),
        "sides": page.sides(probe, training),
        "regions": found._asdict(),
    }


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {"--out": dict(type=Path, required=True, metavar="DIR", help="where the page and the figure go")},
    )
    make_folder(arguments.out)  # before the work: it may be refused
    with Probe(config, topk=config.rollout.tracked, entropy=True) as probe:
        params = probe.state().params
        seen = see(probe, probe.draw(params), params, params)
        result = summary(probe, seen)
    text = page.markdown(result)
    write_text(arguments.out / "report.md", text)
    write_text(arguments.out / "mismatch.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page.draw(by_token(seen), result, arguments.out / "mismatch.png")
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
