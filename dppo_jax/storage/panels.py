"""The panels in which a run is looked at, by the figures and by TensorBoard alike."""

import re
from collections.abc import Iterable
from typing import NamedTuple

EVALUATION = r"eval/([^/]+)/avg"  # the mean score on one evaluation set


class Panel(NamedTuple):
    """Quantities that share an axis."""

    title: str
    tags: tuple[str, ...]  # TensorBoard's
    wide: bool = False  # its range may span decades: drawn on a log scale where it does
    fraction: bool = False  # its axis begins at 0


GROUPS: dict[str, tuple[Panel, ...]] = {
    "Learning": (Panel("Reward", ("reward/mean",)),),  # `layout` adds the evaluations
    "Trust region": (
        Panel("Mismatch: mean |π − μ| before any update", ("mismatch/abs_prob_diff_mean",), wide=True),
        Panel("Policy shift: mean |π − μ|", ("policy/abs_prob_diff_mean",), wide=True),
        Panel("Largest and smallest π − μ", ("policy/prob_diff_max", "policy/prob_diff_min")),
        Panel("Masked fraction of tokens", ("trust_region/masked",), fraction=True),
        Panel("Bad updates: A < 0 and μ − π ≥ 0.5", ("trust_region/bad_updates",), fraction=True),
    ),
    "Policy": (
        Panel("Entropy (nats)", ("policy/entropy",)),
        Panel("Response length (tokens)", ("response/length_mean",)),
        Panel("Gradient norm", ("grad_norm",), wide=True),
    ),
}
PANELS = tuple(panel for group in GROUPS.values() for panel in group)


def evaluations(tags: Iterable[str]) -> tuple[Panel, ...]:
    """A panel for each evaluation set among the tags, by name."""
    names = {tag: match[1] for tag in sorted(tags) if (match := re.fullmatch(EVALUATION, tag))}
    return tuple(Panel(f"Evaluation: {name}", (tag,)) for tag, name in names.items())


def layout() -> dict[str, dict[str, list]]:
    """{group: {title: ["Multiline", [regular expressions of tags]]}}: what `tensorboardX` makes a layout of."""
    charts = {
        group: {p.title: ["Multiline", [f"{re.escape(tag)}$" for tag in p.tags]] for p in panels}
        for group, panels in GROUPS.items()
    }
    charts["Learning"]["Evaluations"] = ["Multiline", [f"{EVALUATION}$"]]
    return charts
