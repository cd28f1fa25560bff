"""The methods under configs/methods as one table: formula, mask, cap, anchor, source.

    python -m experiments.methods > docs/methods.md
"""

import importlib
from pathlib import Path

from dppo_jax.errors import run_main

FOLDER = Path(__file__).parents[1] / "configs" / "methods"
COLUMNS = {"coefficient": "formula", "masked when": "masked", "C": "cap", "anchor": "anchor", "source": "source"}
HEAD = """# Methods

Written by `python -m experiments.methods > docs/methods.md` from `configs/methods/`.

Every method is the gradient sum_t w_t c_t grad log π(a_t), with its own coefficient c_t: M is 0 where a token is
masked. r = π/μ, with μ the behavior policy (what the token was drawn from); π′ is the recomputed, proximal policy,
ρ = π′/μ; A is the advantage. Sources are arXiv numbers where there is one. What each config sets beyond its loss
(advantage, aggregation, shaping, critic, penalty) is in the file.
"""


def names() -> list[str]:
    """Every method's name: the files of configs/methods."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def table() -> str:
    """The page."""
    lines = [HEAD, "| method | config | loss | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for name in names():
        module = importlib.import_module(f"configs.methods.{name}")
        cells = [module.METHOD[key].replace("|", "\\|") for key in COLUMNS.values()]
        config = f"[{name}](../configs/methods/{name}.py)"
        cells = [module.METHOD["title"], config, f"`{module.get_config().loss.name}`", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    print(table())


if __name__ == "__main__":
    run_main(main)
