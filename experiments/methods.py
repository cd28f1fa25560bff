"""The methods of configs/methods.py as a page; caps, anchors and other numbers are read off the bound losses.

    python -m experiments.methods > docs/methods.md
"""

from collections.abc import Mapping
from typing import Any

from configs.methods import METHODS, Method, get_config
from dppo_jax.errors import run_main
from dppo_jax.losses import LOSSES, hyperparameters, required_fields
from dppo_jax.losses.core import BoundLoss
from experiments.run.cli import keys
from experiments.run.setup import Setup

HEAD = """# Methods

For those who compare methods: what each one masks and weighs, its numbers, and its source. This page is written by
`python -m experiments.methods > docs/methods.md`, from the table in [configs/methods.py](../configs/methods.py). Each
method is a config, on the embedded model:

    python -m experiments.train --config configs/methods.py:NAME --workdir runs/NAME

In a config file of your own, `configs.methods.set_method(c, NAME)` sets the same on any model and data.

Every method is the gradient sum_t w_t c_t grad log π(a_t), with its own coefficient c_t: M is 0 where a token is
masked. r = π/μ, with μ the behavior policy (what the token was drawn from); π′ is the recomputed, proximal policy,
ρ = π′/μ; A is the advantage. C caps the weight: `loss.ratio_cap`, or `loss.correction_cap` where it is on ρ. The anchor
is the policy that π is held against. "Other numbers" are keys of `loss`; "sets" are the keys beyond the loss. Sources
are arXiv numbers where there is one.
"""
COLUMNS = (
    "method", "NAME", "loss", "coefficient", "masked when", "C", "anchor", "other numbers", "sets", "source", "note",
)  # fmt: skip
CAPS = {"ratio_cap": "", "correction_cap": " on ρ"}  # hyperparameters that are C, and what the page says of them


def shown(value: Any) -> str:
    """A value as the page has it."""
    return "∞" if value == float("inf") else f"{value:g}" if isinstance(value, float) else str(value)


def listed(values: Mapping[str, Any]) -> str:
    """Keys with their values, or a dash."""
    return ", ".join(f"`{key}` {shown(value)}" for key, value in values.items()) or "–"


def anchor(loss: BoundLoss) -> str:
    """The policy that the loss holds π against: "proximal", "behavior" or "none"."""
    fields = required_fields(loss, ("proximal_logp", "behavior_logp"))
    return "proximal" if "proximal_logp" in fields else "behavior" if fields else "none"


def cells(name: str, method: Method) -> list[str]:
    """A method's row, in the order of COLUMNS."""
    config = get_config(name)
    values = dict(keys(config))
    sets = {key: values[key] for key in method.sets if not key.startswith("loss.")}
    config.reference.coef = 0.0  # the loss itself, without the reference's penalty
    loss = Setup(config).loss
    numbers = {key: loss.keywords[key] for key in sorted(hyperparameters(LOSSES[config.loss.name]))}
    caps = [shown(numbers.pop(key)) + on for key, on in CAPS.items() if key in numbers]
    intro = [method.title, f"`{name}`", f"`{config.loss.name}`", method.formula, method.masked, ", ".join(caps) or "–"]
    return [*intro, anchor(loss), listed(numbers), listed(sets), method.source, method.note]


def page() -> str:
    """docs/methods.md."""
    lines = [HEAD, f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, method in METHODS.items():
        row = " | ".join(cell.replace("|", "\\|") for cell in cells(name, method))
        lines.append(f"| {row} |")
    return "\n".join(lines)


def main() -> None:
    print(page())


if __name__ == "__main__":
    run_main(main)
