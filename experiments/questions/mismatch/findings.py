"""What a comparison of two passes shows, in sentences: where they part, by what, and whether a region feels it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dppo_jax.token_head import LogitSums
from experiments.questions.mismatch.passes import Compared
from experiments.regions import Regions

FLOOR = 1e-6  # relative; some roundings of float32, which two orders of one sum differ by
JUMP = 10.0  # passes part where the difference is so many times that of the place before, and of FLOOR at least
NEAR, GROWTH = 3, 1.5  # a difference grows with the position if it is so many times that of positions 1 to NEAR

# Shares of the tokens with A != 0 that were outside before any update, and what became of the runs: the survival map
# (experiments/questions/survival), activations of one bit of mantissa.
LIVES = 0.0008  # dppo_binary_tv, delta 0.05: lived as long as no mask at all did
DIES = 0.012  # dppo_binary_tv, delta 0.02: died from a learning rate of 1.8e-4 on
DIES_EVERYWHERE = 0.071  # clip_higher: died at every learning rate


class Place(NamedTuple):
    """Where two passes part."""

    name: str
    there: float  # relative difference of the states, mean over tokens
    before: float  # at the place before
    hint: str  # what the positions say of the cause; "" for nothing


class LogitDifference(NamedTuple):
    """Of the rollout's logits y from training's z, over tokens and vocabulary."""

    relative: float  # |y - z| / |z|
    factor: float  # f that fits y = f z best
    rest: float  # |y - f z| / |z|

    @property
    def is_factor(self) -> bool:
        """Whether a factor is most of the difference."""
        return abs(self.factor - 1) > max(2 * self.rest, JUMP * FLOOR)


def names(count: int) -> list[str]:
    """Of the states in `Compared.difference`, which are so many."""
    return ["the embedding", *(f"layer {number}" for number in range(count - 2)), "the final norm"]


def by_state(compared: Compared) -> list[float]:
    """The relative difference of each state, mean over tokens."""
    return (compared.difference @ compared.tokens / compared.tokens.sum()).tolist()


def logit_difference(logits: LogitSums, mask: np.ndarray) -> LogitDifference:
    """Over the tokens in the mask."""
    difference, product, policy, behavior = (np.asarray(x, np.float64)[mask].sum() for x in logits)
    factor = product / policy
    rest = max(behavior - factor * product, 0.0)  # of the squares' rounding alone where the fit is perfect
    return LogitDifference(np.sqrt(difference / policy).item(), factor.item(), np.sqrt(rest / policy).item())


def places(compared: Compared) -> list[Place]:
    """Where the difference jumps, from the embedding on."""
    means, found = by_state(compared), []
    for at, name in enumerate(names(len(means))):
        before = means[at - 1] if at else 0.0
        if means[at] > JUMP * max(before, FLOOR):
            found.append(Place(name, means[at], before, _hint(compared, at) if at else ""))
    return found


def _hint(compared: Compared, at: int) -> str:
    """From the difference by position: a sample's first token attends to itself alone, wherever it stands."""
    there = compared.difference[at][compared.tokens > 0]
    before = compared.difference[at - 1][compared.tokens > 0]
    if there[0] > JUMP * max(before[0], FLOOR):
        return ""
    if len(there) > NEAR + 1 and there[NEAR + 1 :].mean() > GROWTH * there[1 : NEAR + 1].mean():
        return "nothing at a sample's first token, and it grows with position: rope or positions"
    return "nothing at a sample's first token, which attends to itself alone: attention"


def where_they_part(compared: Compared, mask: np.ndarray, behavior_logp: np.ndarray) -> list[str]:
    """In sentences; `behavior_logp` [B, R] as the rollout recorded it."""
    means, found, logits = by_state(compared), places(compared), logit_difference(compared.logits, mask)
    sentences = []
    for number, place in enumerate(found):
        before = f", {_short(place.before)} before it" if place.name != "the embedding" else ""
        hint = f" ({place.hint})" if place.hint else ""
        verb = "part again" if number else "part"
        sentences.append(f"The passes {verb} at {place.name}: {_short(place.there)} there{before}{hint}.")
    if not found:
        most = int(np.argmax(means))
        name = names(len(means))[most]
        distance = f": {_short(means[most])} apart at {name}, at most" if means[most] else ", to the bit"
        sentences.append(f"Both passes have the same hidden states{distance}.")
    if logits.is_factor:
        scaled = means[-1] > abs(logits.factor - 1) / 2
        cause = ", as the hidden states do" if scaled else ": a temperature on one side"
        factor = f"{logits.factor:.3g}" if abs(logits.factor - 1) > 0.01 else f"{logits.factor:.6g}"
        sentences.append(f"The logits differ by a factor of {factor} (rollout over training){cause}.")
    elif logits.relative > JUMP * max(means[-1], FLOOR):
        sentences.append(
            f"The passes part at the head: logits differ by {_short(logits.relative)}, its inputs by "
            f"{_short(means[-1])}: its weights or its arithmetic."
        )
    decoding, passes = decoding_gap(compared, mask, behavior_logp), _gap(compared.forced_logp, compared.logp, mask)
    if decoding > JUMP * max(passes, FLOOR):
        sentences.append(
            "The rollout's decoding parts from its own arithmetic: probabilities that it recorded are "
            f"{_short(decoding)} away from those of one pass over the same tokens: its weights, its cache, its "
            "positions or its sampling."
        )
    return sentences


def decoding_gap(compared: Compared, mask: np.ndarray, behavior_logp: np.ndarray) -> float:
    """Mean difference of the probabilities that the rollout recorded and those of its arithmetic in one pass."""
    return _gap(behavior_logp, compared.forced_logp, mask)


def _gap(logp: np.ndarray, other_logp: np.ndarray, mask: np.ndarray) -> float:
    return float(np.abs(np.exp(logp[mask]) - np.exp(other_logp[mask])).mean())


def _short(x: float) -> str:
    """One digit, such as 4e-2; 0 as such."""
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e+") if x else "0"


def percent(share: float) -> str:
    """Of a share, two digits."""
    return f"{100 * share:.2g}%"


def verdict(name: str, regions: Regions) -> str:
    """Whether the region of the loss of that name feels the mismatch, in a sentence."""
    if name in regions.without:
        return f"Your loss has no region: {name} leaves no token out."
    if name in regions.left_out:
        return f"No verdict on your region: {regions.left_out[name]}."
    if not regions.tokens:
        return "No verdict on your region: no token of this batch has A≠0, since every group has equal rewards."
    share = regions.by_loss[name].outside
    found = f"{percent(share)} of the {regions.tokens:,} tokens with A≠0 are outside {name} before any update"
    if share <= LIVES:
        seen = 3 / regions.tokens  # none of n is compatible, at 95%, with a share of 3/n
        few = f"; so few tokens would hide a share of {percent(seen)}" if seen > LIVES else ""
        return f"Your region is safe: {found} (runs lived with {percent(LIVES)}{few})."
    if share < DIES:
        fate = f"runs lived with {percent(LIVES)} and died with {percent(DIES)}"
    elif share < DIES_EVERYWHERE:
        fate = f"runs died with {percent(DIES)} where the learning rate was not small"
    else:
        fate = f"runs died with {percent(DIES_EVERYWHERE)} at every learning rate"
    return f"Your region is touched by noise: {found} ({fate})."


def in_bins(
    values: np.ndarray, edges: tuple[float, ...], tokens: Mapping[str, np.ndarray], *, whole: bool = False
) -> dict[str, Any]:
    """Divergences of tokens by bins of `values`: edge i to edge i + 1; only bins that hold any. `whole` numbers: to the
    last below edge i + 1."""
    at, found = np.clip(np.digitize(values, edges) - 1, 0, len(edges) - 2), {}
    ratio = tokens["pi"] / np.maximum(tokens["mu"], 1e-30)
    for b, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = at == b
        if inside.any():
            last = high - 1 if whole else high
            found[f"{low:g}" if last == low else f"{low:g}-{last:g}"] = {
                "tokens": int(inside.sum()),
                "abs_prob_diff_mean": float(np.abs(tokens["pi"] - tokens["mu"])[inside].mean()),
                "log_ratio_std": float(np.std(np.log(np.maximum(ratio[inside], 1e-30)))),
                "ratio_max": float(ratio[inside].max()),
                "tv": spread(tokens["tv"][inside]),
                "kl": spread(tokens["kl"][inside]),
            }
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, 99% quantile and largest."""
    return {"mean": float(values.mean()), "99%": float(np.quantile(values, 0.99)), "max": float(values.max())}
