"""Reference values for the methods that need a sequence, three policies, a reference policy or an exact divergence.

Float64, one sequence and one token at a time, from the papers' formulas. Imports nothing of dppo_jax. The inputs are
rounded to float32 first, so both sides see the same numbers; no statistic lies within 1e-4 of its threshold (relative),
except in the case "ties", where it may lie on it.

    python tests/golden/losses/make_methods.py            # writes methods.npz beside this file
    python tests/golden/losses/make_methods.py --check    # regenerates; non-zero status where the file differs
"""

import argparse
import cmath
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from make_losses import INF, binary, kl, log_softmax, same, tv

FILE = Path(__file__).with_name("methods.npz")
VOCABULARY, ROWS, LENGTH, TRACKED = 48, 5, 40, 4
SUMS = ("gap", "square", "signed", "signed_square")  # over the tokens beside the sampled one, as the types have them
POLICIES = {"logp": "pi", "behavior_logp": "mu", "proximal_logp": "pr", "reference_logp": "ref"}
RELATIVE, ABSOLUTE = 1e-4, 1e-5

WIDE, TIGHT = dict(eps_low=0.2, eps_high=0.28), dict(eps_low=0.1, eps_high=0.05)
CLIP = [dict(**WIDE, ratio_cap=INF), dict(**TIGHT, ratio_cap=1.02)]
CORRECTED = [dict(**WIDE, correction_cap=2.0), dict(**TIGHT, correction_cap=1.01)]
SIDES = [dict(delta_low=0.15, delta_high=0.2, ratio_cap=5.0), dict(delta_low=0.03, delta_high=0.02, ratio_cap=1.05)]
KL_SIDES = [
    dict(delta_low=0.05, delta_high=0.05, ratio_cap=5.0),
    dict(delta_low=0.004, delta_high=0.002, ratio_cap=1.5),
]


def one_delta(usual: float, tight: float) -> list[dict]:
    return [dict(delta=usual, ratio_cap=INF), dict(delta=tight, ratio_cap=1.02)]


SETTINGS: dict[str, list[dict]] = {
    "reinforce": [{}],
    "dual_clip": [dict(**WIDE, dual_cap=3.0, ratio_cap=INF), dict(**TIGHT, dual_cap=1.1, ratio_cap=1.05)],
    "ppo_clip_recomputed": CLIP,
    "gspo": [dict(eps_low=3e-4, eps_high=4e-4, ratio_cap=INF), dict(eps_low=0.005, eps_high=0.005, ratio_cap=0.999)],
    "sapo": [dict(tau_low=1.05, tau_high=1.0), dict(tau_low=20.0, tau_high=5.0)],
    "token_tis": CORRECTED,
    "sequence_tis": CORRECTED,
    "token_mis": CORRECTED,
    "sequence_mis": CORRECTED,
    "icepop": [
        dict(**WIDE, correction_low=0.5, correction_high=5.0),
        dict(**TIGHT, correction_low=0.97, correction_high=1.1),
    ],
    "bypass": CLIP,
    "deepseek_v32": [dict(**WIDE, delta_low=0.1, ratio_cap=INF), dict(**TIGHT, delta_low=0.002, ratio_cap=1.1)],
    "trm_max": one_delta(0.5, 0.05),
    "trm_mean": one_delta(0.05, 0.002),
    "vaco": one_delta(0.1, 0.02),
    "kpop": one_delta(0.1, 0.05),
    "binary_tv_unsigned": SIDES,
    "kimi_k25": [dict(eps_low=0.5, eps_high=1.0, tau=0.1), dict(**TIGHT, tau=1.0)],
    "drpo": one_delta(0.2, 0.03),
    "cppo": [
        dict(delta=0.15, delta_budget=0.02, w_min=0.5, ratio_cap=5.0),
        dict(delta=0.02, delta_budget=0.03, w_min=0.1, ratio_cap=INF),
        dict(delta=0.04, delta_budget=0.025, w_min=0.1, ratio_cap=1.05),
    ],
    "geometric_mask": [
        dict(eps_low=0.1, eps_high=0.2, ratio_cap=INF),
        dict(eps_low=5e-3, eps_high=2e-3, ratio_cap=1.02),
    ],
    "flash_reinforce": one_delta(0.02, 3e-3),
    "vespo": [
        dict(k_low=3.0, k_high=2.0, lambda_low=2.0, lambda_high=3.0),
        dict(k_low=0.5, k_high=1.5, lambda_low=0.0, lambda_high=0.2),
    ],
    "gmpo": [dict(eps_low=0.4, eps_high=0.4), dict(eps_low=0.02, eps_high=0.03)],
    "minpro": [dict(eps_low=1.0, eps_high=4.0), dict(eps_low=0.1, eps_high=0.05)],
    "m2po": one_delta(0.04, 2e-3),
    "estr": [
        dict(**WIDE, delta=1.0, entropy_floor=0.01, ratio_cap=INF),
        dict(**TIGHT, delta=1e-3, entropy_floor=0.1, ratio_cap=1.02),
    ],
    "dis": [dict(eps_low=0.3, eps_high=5.0, ratio_cap=INF), dict(**TIGHT, ratio_cap=1.02)],
    "ripo": [
        dict(budget=0.05, ratio_low=0.5, ratio_high=10.0, ratio_cap=INF),
        dict(budget=0.001, ratio_low=0.92, ratio_high=1.1, ratio_cap=1.05),
    ],
    "aspo": [dict(**WIDE, ratio_cap=3.0), dict(**TIGHT, ratio_cap=1.05)],
    "up": [dict(eps_low=0.2, ratio_cap=INF), dict(eps_low=0.05, ratio_cap=1.05)],
    "prime_rl": [dict(delta_low=0.2, delta_high=0.2, tau=1e-3), dict(delta_low=0.03, delta_high=0.02, tau=1.0)],
    "distill": [dict(delta_low=0.2, ratio_cap=INF), dict(delta_low=0.02, ratio_cap=1.05)],
    "dppo_exact_tv": SIDES,
    "dppo_exact_kl": KL_SIDES,
    "pdm_exact_tv": SIDES,
    "pdm_exact_kl": KL_SIDES,
    "pdm_topk_tv": [h | dict(tail=tail) for h in SIDES for tail in ("aggregated", "uniform")],
    "pdm_topk_kl": [h | dict(tail=tail) for h in KL_SIDES for tail in ("aggregated", "uniform")],
}
NEVER_MASKED = ("reinforce", "sapo", "drpo", "vespo", "minpro")

# Where policies are equal, every statistic equals these thresholds. DRPO divides by its own.
NEUTRAL = {"eps": 0.0, "budget": 0.0, "delta": 0.0, "correction": 1.0, "dual": 1.0}
TIES = {
    name: [{k: v if name == "drpo" else NEUTRAL.get(k.split("_")[0], v) for k, v in several[0].items()}]
    for name, several in SETTINGS.items()
}

# A loss with a penalty to the reference policy: estimator -> strengths.
BASES = {
    "ppo_clip": dict(eps_low=0.2, eps_high=0.28, ratio_cap=3.0),
    "dppo_binary_tv": dict(delta_low=0.15, delta_high=0.05, ratio_cap=5.0),
}
ESTIMATORS, STRENGTHS = ("k1", "k2", "k3"), (0.04, 1.0)


@dataclass(frozen=True)
class Token:
    pi: float
    mu: float
    pr: float
    ref: float
    adv: float
    tv: float
    kl: float
    entropy: float
    gap: float
    square: float
    signed: float
    signed_square: float
    tracked: list[tuple[float, float]]  # (pi, mu) of the behavior policy's likeliest tokens
    has_sampled: bool

    @property
    def r(self) -> float:
        return self.pi / self.mu

    @property
    def q(self) -> float:
        return self.pi / self.pr

    @property
    def rho(self) -> float:
        return self.pr / self.mu


Sequence = list[Token]
Clause = tuple[bool, float]  # whether it masks, and how far the statistic is from where that would change
NEVER: Clause = (False, INF)


def above(x: float, bound: float) -> Clause:
    """x > bound. The distance is relative to the greater of the two, and 0 only where they are equal."""
    gap = abs(x - bound)
    if gap == 0:
        return False, 0.0
    return x > bound, gap / max(abs(x), abs(bound)) if gap > ABSOLUTE else RELATIVE / 2


def at_least(x: float, bound: float) -> Clause:
    """x >= bound."""
    below, far = above(bound, x)
    return not below, far


def both(a: Clause, b: Clause) -> Clause:
    if a[0] and b[0]:
        return True, min(a[1], b[1])
    return False, max(far for fires, far in (a, b) if not fires)


def two_sided(x: float, high: float, low: float, adv: float) -> Clause:
    if adv > 0:
        return above(x, high)
    return above(low, x) if adv < 0 else NEVER


def away(t: Token) -> Clause:
    """A (r - 1) > 0."""
    return two_sided(t.r, 1.0, 1.0, t.adv)


def clip(ratio: float, h: dict, adv: float) -> Clause:
    return two_sided(ratio, 1 + h["eps_high"], 1 - h["eps_low"], adv)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# Statistics of a sequence.


def log_ratios(seq: Sequence) -> list[float]:
    return [math.log(t.r) for t in seq]


def gspo_ratio(seq: Sequence) -> float:
    return math.exp(mean(log_ratios(seq)))


def correction(seq: Sequence) -> float:
    return math.prod(t.rho for t in seq)


def quantile(values: list[float], at: float) -> float:
    x, position = sorted(values), at * (len(values) - 1)
    k = min(int(position), len(x) - 1)
    return x[k] + (position - k) * (x[min(k + 1, len(x) - 1)] - x[k])


def budget(seq: Sequence, h: dict) -> float:
    b = quantile([abs(t.pi - t.mu) for t in seq], 0.9)
    return min(max(b, h["delta_budget"]), 2 * h["delta_budget"])


def place(t: Token, seq: Sequence) -> int:
    return next(i for i, x in enumerate(seq) if x is t)


def cppo(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    i = place(t, seq)
    w = [1 - (1 - h["w_min"]) * j / max(len(seq) - 1, 1) for j in range(len(seq))]
    z = [w[j] * abs(x.pi - x.mu) for j, x in enumerate(seq)]
    left = h["delta"] + budget(seq, h) * math.fsum(w[:i]) - math.fsum(z[:i])
    return [both(away(t), above(z[i], h["delta"])), both(away(t), above(z[i], left))]


def gmpo_objective(logps: list[complex], seq: Sequence, h: dict) -> complex:
    """exp of the mean log ratio, each held on the side of its token's advantage; 0 where that is 0."""

    def held(logp: complex, t: Token) -> complex:
        x = logp - math.log(t.mu)
        if t.adv > 0:
            return h["eps_high"] if x.real > h["eps_high"] else x
        return (-h["eps_low"] if x.real < -h["eps_low"] else x) if t.adv < 0 else 0

    return cmath.exp(sum(map(held, logps, seq)) / len(seq))


def gmpo(t: Token, seq: Sequence, h: dict) -> float:
    """T A times the derivative of the objective by log pi of one token, by a complex step."""
    step, at = 1e-20, place(t, seq)
    logps = [math.log(x.pi) + (step * 1j if i == at else 0) for i, x in enumerate(seq)]
    return len(seq) * t.adv * gmpo_objective(logps, seq, h).imag / step


def vespo(t: Token, seq: Sequence, h: dict) -> float:
    side = "high" if t.adv >= 0 else "low"
    w = math.prod(x.r for x in seq)
    return w ** h[f"k_{side}"] * math.exp(h[f"lambda_{side}"] * (1 - w)) * t.adv


def minpro(t: Token, seq: Sequence, h: dict) -> float:
    weight = t.r * min((x.r for x in seq[: place(t, seq)]), default=1.0)
    return min(max(weight, 1 - h["eps_low"]), 1 + h["eps_high"]) * t.adv


def m2po(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    """The largest is taken out, one by one, until the second moment of the rest is small enough."""
    left, far = [x for x in seq if away(x)[0]], INF
    moved = any(x is t for x in left)
    while left:
        fires, gap = above(mean([math.log(x.r) ** 2 for x in left]), h["delta"])
        far = min(far, gap)
        if not fires:
            break
        left.remove(max(left, key=lambda x: math.log(x.r) ** 2))
    return [both(away(t), (moved and not any(x is t for x in left), far))]


def estr(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    bound = h["delta"] * (t.entropy + h["entropy_floor"])
    return [clip(t.r, h, t.adv), above(math.log(t.r) ** 2, bound)]


# Methods. A mask is (token, its sequence, hyperparameters) -> clauses, of which any masks.


def clip_r(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    return [clip(t.r, h, t.adv)]


def clip_q(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    return [clip(t.q, h, t.adv)]


def dual(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    return [*clip_r(t, seq, h), above(t.r, h["dual_cap"]) if t.adv < 0 else NEVER]


def off_policy(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    return [*clip_r(t, seq, h), above(mean([-x for x in log_ratios(seq)]), h["delta_low"]) if t.adv < 0 else NEVER]


def icepop(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    return [*clip_q(t, seq, h), above(h["correction_low"], t.rho), above(t.rho, h["correction_high"])]


def kpop(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    mu, pi = binary(t.mu), binary(t.pi)
    return [above(kl(mu, pi), h["delta"]), above(kl(pi, mu), h["delta"])]


def ripo(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    """Beyond the token's own bound, or beyond the fixed one."""
    eps = math.sqrt(h["budget"] / t.mu)
    return [two_sided(t.r, 1 + eps, 1 - eps, t.adv), two_sided(t.r, h["ratio_high"], h["ratio_low"], t.adv)]


def distill(t: Token, seq: Sequence, h: dict) -> list[Clause]:
    """The reference policy's numbers are the teacher's here."""
    return [both(above(t.pi, t.ref), above(t.mu - t.pi, h["delta_low"]))]


def exact(t: Token, divergence: float, h: dict) -> list[Clause]:
    return [both(away(t), above(divergence, h["delta_high"] if t.adv > 0 else h["delta_low"]))]


def slope(kind: str, pi: list[float], mu: list[float], sampled: int) -> float:
    """sum_j dD/dpi_j dpi_j, where the logits move along dz = e_a - pi, so that dpi_j = pi_j (dz_j - mean dz)."""
    dz = [float(j == sampled) - p for j, p in enumerate(pi)]
    mean_dz = math.fsum(p * d for p, d in zip(pi, dz, strict=True))
    by_pi = [-m / p if kind == "kl" else ((p > m) - (p < m)) / 2 for p, m in zip(pi, mu, strict=True)]
    return math.fsum(b * p * (d - mean_dz) for b, p, d in zip(by_pi, pi, dz, strict=True))


def entries(t: Token) -> tuple[list[tuple[float, float]], tuple[float, float], int]:
    """(pi, mu) of TopK ∪ {sampled} and of the rest, and where the sampled token is among the first."""
    pairs = list(t.tracked) if t.has_sampled else [*t.tracked, (t.pi, t.mu)]
    rest = 1 - math.fsum(p for p, _ in pairs), 1 - math.fsum(m for _, m in pairs)
    distances = [abs(p - t.pi) + abs(m - t.mu) for p, m in pairs]
    return pairs, rest, distances.index(min(distances))


def pdm(t: Token, divergence: float, slope: float, h: dict) -> list[Clause]:
    grows = two_sided(slope, 0.0, 0.0, t.adv)
    return [both(grows, above(divergence, h["delta_high"] if t.adv > 0 else h["delta_low"]))]


def pdm_topk(t: Token, kind: str, h: dict) -> list[Clause]:
    """The divergence with the rest as one event; its slope with the rest as its tokens, equally likely, or as one."""
    pairs, (rest_pi, rest_mu), sampled = entries(t)
    count = VOCABULARY - len(pairs) if h["tail"] == "uniform" else 1
    pi, mu = ([*(pair[i] for pair in pairs), *[rest / count] * count] for i, rest in enumerate((rest_pi, rest_mu)))
    events = [*(m for _, m in pairs), rest_mu], [*(p for p, _ in pairs), rest_pi]
    return pdm(t, {"tv": tv, "kl": kl}[kind](*events), slope(kind, pi, mu, sampled), h)


def pdm_exact(t: Token, kind: str, h: dict) -> list[Clause]:
    """The slope from the sums over all other tokens, to which the sampled token's terms are added."""
    if kind == "kl":
        return pdm(t, t.kl, t.pi - t.mu + t.gap + t.pi * (t.mu - t.pi), h)
    s = (t.pi > t.mu) - (t.pi < t.mu)
    square, signed, signed_square = t.square + t.pi**2, t.signed + s * t.pi, t.signed_square + s * t.pi**2
    return pdm(t, t.tv, (s * t.pi - signed_square - (t.pi - square) * signed) / 2, h)


MASKS: dict[str, Callable[[Token, Sequence, dict], list[Clause]]] = {
    "reinforce": lambda t, seq, h: [],
    "dual_clip": dual,
    "ppo_clip_recomputed": clip_q,
    "gspo": lambda t, seq, h: [clip(gspo_ratio(seq), h, t.adv)],
    "sapo": lambda t, seq, h: [],
    "token_tis": clip_q,
    "sequence_tis": clip_q,
    "token_mis": lambda t, seq, h: [*clip_q(t, seq, h), above(t.rho, h["correction_cap"])],
    "sequence_mis": lambda t, seq, h: [*clip_q(t, seq, h), above(correction(seq), h["correction_cap"])],
    "icepop": icepop,
    "bypass": clip_r,
    "deepseek_v32": off_policy,
    "trm_max": lambda t, seq, h: [above(max(x**2 / 2 for x in log_ratios(seq)), h["delta"])],
    "trm_mean": lambda t, seq, h: [above(mean([x.r - 1 - math.log(x.r) for x in seq]), h["delta"])],
    "vaco": lambda t, seq, h: [both(away(t), above(mean([abs(x.r - 1) / 2 for x in seq]), h["delta"]))],
    "kpop": kpop,
    "binary_tv_unsigned": lambda t, seq, h: [above(t.pi - t.mu, h["delta_high"]), above(t.mu - t.pi, h["delta_low"])],
    "kimi_k25": lambda t, seq, h: [above(t.r, 1 + h["eps_high"]), above(1 - h["eps_low"], t.r)],
    "drpo": lambda t, seq, h: [],
    "cppo": cppo,
    "geometric_mask": lambda t, seq, h: [
        above(gspo_ratio(seq), 1 + h["eps_high"]),
        above(1 - h["eps_low"], gspo_ratio(seq)),
    ],
    "flash_reinforce": lambda t, seq, h: [above(mean([kl(binary(x.mu), binary(x.pi)) for x in seq]), h["delta"])],
    "vespo": lambda t, seq, h: [],
    "gmpo": lambda t, seq, h: [two_sided(math.log(t.r), h["eps_high"], -h["eps_low"], t.adv)],
    "minpro": lambda t, seq, h: [],
    "m2po": m2po,
    "estr": estr,
    "dis": lambda t, seq, h: [at_least(1 - h["eps_low"], t.r), at_least(t.r, 1 + h["eps_high"])],
    "ripo": ripo,
    "aspo": clip_r,
    "up": lambda t, seq, h: [above(1 - h["eps_low"], t.r) if t.adv < 0 else NEVER],
    "prime_rl": lambda t, seq, h: [two_sided(t.pi - t.mu, h["delta_high"], -h["delta_low"], t.adv)],
    "distill": distill,
    "dppo_exact_tv": lambda t, seq, h: exact(t, t.tv, h),
    "dppo_exact_kl": lambda t, seq, h: exact(t, t.kl, h),
    "pdm_topk_tv": lambda t, seq, h: pdm_topk(t, "tv", h),
    "pdm_topk_kl": lambda t, seq, h: pdm_topk(t, "kl", h),
    "pdm_exact_tv": lambda t, seq, h: pdm_exact(t, "tv", h),
    "pdm_exact_kl": lambda t, seq, h: pdm_exact(t, "kl", h),
    "ppo_clip": clip_r,
    "dppo_binary_tv": lambda t, seq, h: [two_sided(t.pi - t.mu, h["delta_high"], -h["delta_low"], t.adv)],
}


def sapo(t: Token, h: dict) -> float:
    g = 1 / (1 + math.exp(-(h["tau_high"] if t.adv > 0 else h["tau_low"]) * (t.r - 1)))
    return 4 * g * (1 - g) * t.r * t.adv


def drpo(t: Token, h: dict) -> float:
    sign = (t.adv > 0) - (t.adv < 0)
    return min(t.r, h["ratio_cap"]) * t.adv * (1 - sign * (t.pi - t.mu) / h["delta"])


# c of a token that is not masked; min(r, C) A where a method is not named.
COEFFICIENTS: dict[str, Callable[[Token, Sequence, dict], float]] = {
    "reinforce": lambda t, seq, h: t.adv,
    "ppo_clip_recomputed": lambda t, seq, h: min(t.q, h["ratio_cap"]) * t.adv,
    "gspo": lambda t, seq, h: min(gspo_ratio(seq), h["ratio_cap"]) * t.adv,
    "sapo": lambda t, seq, h: sapo(t, h),
    "token_tis": lambda t, seq, h: t.q * min(t.rho, h["correction_cap"]) * t.adv,
    "sequence_tis": lambda t, seq, h: t.q * min(correction(seq), h["correction_cap"]) * t.adv,
    "token_mis": lambda t, seq, h: t.q * t.rho * t.adv,
    "sequence_mis": lambda t, seq, h: t.q * correction(seq) * t.adv,
    "icepop": lambda t, seq, h: t.q * t.rho * t.adv,
    "kimi_k25": lambda t, seq, h: t.r * t.adv,
    "drpo": lambda t, seq, h: drpo(t, h),
    "vespo": vespo,
    "gmpo": gmpo,
    "minpro": minpro,
    "aspo": lambda t, seq, h: min(t.mu / t.pi if t.adv > 0 else t.r, h["ratio_cap"]) * t.adv,
    "up": lambda t, seq, h: (1 if t.adv > 0 else min(t.r, h["ratio_cap"])) * t.adv,
    "prime_rl": lambda t, seq, h: t.r * t.adv,
    "distill": lambda t, seq, h: min(t.r, h["ratio_cap"]) * (math.log(t.ref) - math.log(t.pi)),
}


def coefficient(name: str, t: Token, seq: Sequence, h: dict) -> tuple[float, bool]:
    """(c, kept). The penalty on log(r)^2 acts on masked tokens as well."""
    keep = not any(fires for fires, _ in MASKS[name](t, seq, h))
    unmasked = COEFFICIENTS.get(name, lambda t, seq, h: min(t.r, h["ratio_cap"]) * t.adv)(t, seq, h)
    penalty = 2 * h["tau"] * math.log(t.r) if name in ("kimi_k25", "prime_rl") else 0.0
    return (unmasked if keep else 0.0) - penalty, keep


def reference_term(t: Token, estimator: str, beta: float) -> float:
    log_ratio = math.log(t.pi) - math.log(t.ref)
    return -beta * {"k1": 1 + log_ratio, "k2": log_ratio, "k3": 1 - t.ref / t.pi}[estimator]


# A case's sequences, and its answers.


def sequences_of(case: dict) -> list[tuple[list[tuple[int, int]], Sequence]]:
    """Each sequence's positions in order, and its tokens; a row without segments is one sequence."""
    found = []
    for b, row in enumerate(case["mask"]):
        at = [int(t) for t in np.flatnonzero(row)]
        segment = {t: int(case["segments"][b, t]) if "segments" in case else 1 for t in at}
        for s in sorted(set(segment.values())):
            positions = [(b, t) for t in at if segment[t] == s]
            found.append((positions, [token_at(case, p) for p in positions]))
    return found


def token_at(case: dict, at: tuple[int, int]) -> Token:
    probabilities = {short: math.exp(float(case[name][at])) for name, short in POLICIES.items()}
    others = {"advantages": "adv", "behavior_entropy": "entropy"} | {name: name for name in ("tv", "kl", *SUMS)}
    rest = {short: float(case[name][at]) for name, short in others.items()}
    tracked = np.exp(np.stack([case["topk_logp"][at], case["topk_behavior_logp"][at]], axis=-1).astype(np.float64))
    has_sampled = bool(case["has_sampled"][at])
    pairs = [(p, m) for p, m in tracked.tolist()]
    return Token(**probabilities, **rest, tracked=pairs, has_sampled=has_sampled)


def reference(case: dict, settings: dict) -> dict[str, np.ndarray]:
    """coef/NAME and keep/NAME [settings, B, R]; reference/BASE/ESTIMATOR [strengths, B, R]. 0 outside the mask."""
    found: dict[str, np.ndarray] = {}

    def array(key: str, count: int, dtype: type) -> np.ndarray:
        return found.setdefault(key, np.zeros((count, *case["mask"].shape), dtype))

    for positions, seq in sequences_of(case):
        for at, t in zip(positions, seq, strict=True):
            for name, several in settings.items():
                coef, keep = (array(f"{k}/{name}", len(several), d) for k, d in (("coef", float), ("keep", bool)))
                for i, h in enumerate(several):
                    coef[i, *at], keep[i, *at] = coefficient(name, t, seq, h)
            for base, h in BASES.items():
                c, _ = coefficient(base, t, seq, h)
                for estimator in ESTIMATORS:
                    coef = array(f"reference/{base}/{estimator}", len(STRENGTHS), float)
                    coef[:, *at] = [c + reference_term(t, estimator, beta) for beta in STRENGTHS]
    return found


# Inputs. RandomState, because its stream never changes between releases of NumPy.

# Drift of the proximal policy from the behavior policy, of the policy from that, of the reference policy.
NEAR, MODERATE, FAR = (0.005, 0.01, 0.02), (0.05, 0.15, 0.3), (0.4, 0.8, 1.0)
EQUAL = ("pi = pr = mu", "pi = pr", "pi = mu", "pr = mu", "none")

# Rows of (segment, columns, drift, advantage or None for one per token, which policies are equal or None, or "mixed").
LAYOUT: dict[str, list[list[tuple]]] = {
    "packed": [
        [(1, 17, NEAR, 1.3, None), (2, 1, MODERATE, -0.7, None), (3, 12, FAR, -1.0, None)],
        [(1, 40, MODERATE, -0.6, None)],
        [(1, 9, FAR, 0.8, None), (2, 23, NEAR, -1.7, None)],
        [(1, 1, FAR, 2.0, None), (2, 8, NEAR, 0.5, None), (3, 20, MODERATE, 1.1, None)],
        [(3, 11, MODERATE, 0.0, None), (1, 20, MODERATE, -0.9, None)],
    ],
    "rows": [
        [(1, 40, FAR, 0.7, None)],
        [(1, 33, NEAR, -1.2, None)],
        [(1, 1, MODERATE, 1.0, None)],
        [(1, 25, FAR, -0.4, None)],
        [(1, 12, MODERATE, 1.5, None)],
    ],
    "tokens": [
        [(1, 14, MODERATE, None, None), (2, 20, FAR, None, None)],
        [(1, 38, NEAR, None, None)],
        [(1, 1, NEAR, None, None), (2, 16, FAR, None, None), (3, 10, NEAR, None, None)],
        [(1, 40, MODERATE, None, None)],
        [],
    ],
    "ties": [
        [(1, 12, MODERATE, 1.0, EQUAL[0]), (2, 1, MODERATE, -1.0, EQUAL[0]), (3, 15, MODERATE, -0.5, "mixed")],
        [(1, 20, MODERATE, -2.0, EQUAL[2]), (2, 14, MODERATE, 1.5, "mixed")],
        [(1, 30, MODERATE, 0.5, EQUAL[1])],
        [(1, 16, MODERATE, -1.0, EQUAL[3]), (2, 18, MODERATE, -0.5, EQUAL[0])],
        [(1, 38, MODERATE, None, "mixed")],
    ],
}


def draw_token(rng: np.random.RandomState, drift: tuple, adv: float | None, equal: str | None) -> dict[str, np.generic]:
    mu = log_softmax(rng.choice([0.5, 2.0, 4.0]) * rng.standard_normal(VOCABULARY))
    drawn = [x * rng.standard_normal(VOCABULARY) for x in drift]
    equal = rng.choice(EQUAL) if equal == "mixed" else equal
    pr = mu if equal in ("pi = pr = mu", "pr = mu") else log_softmax(mu + drawn[0])
    pi = mu if equal in ("pi = pr = mu", "pi = mu") else pr if equal == "pi = pr" else log_softmax(pr + drawn[1])
    ref = log_softmax(mu + drawn[2]) if equal is None or rng.randint(2) else pi
    sampled = rng.choice([rng.choice(VOCABULARY, p=np.exp(mu)), rng.randint(VOCABULARY), mu.argmax()])
    token = dict(zip(POLICIES, (np.float32(x[sampled]) for x in (pi, mu, pr, ref)), strict=True))
    each = np.exp(mu).tolist(), np.exp(pi).tolist()
    token |= {"tv": np.float32(tv(*each)), "kl": np.float32(kl(*each))}
    token["behavior_entropy"] = np.float32(-math.fsum(p * math.log(p) for p in each[0]))
    others = np.arange(VOCABULARY) != sampled
    p, m = np.exp(pi)[others], np.exp(mu)[others]
    token |= zip(SUMS, map(np.float32, (p @ (m - p), p @ p, np.sign(p - m) @ p, np.sign(p - m) @ p**2)), strict=True)
    ids = np.argsort(-mu, kind="stable")[:TRACKED]
    token |= {"topk_logp": pi[ids].astype(np.float32), "topk_behavior_logp": mu[ids].astype(np.float32)}
    token["has_sampled"] = np.bool_(sampled in ids)
    value = rng.standard_normal() * rng.choice([0.0, 1.0, 1.0, 2.0]) if adv is None else adv
    return token | {"advantages": np.float32(value)}


def well_posed(seq: list[dict], settings: dict, ties: bool) -> bool:
    tokens = [token_at({name: np.asarray(x)[None, None] for name, x in t.items()}, (0, 0)) for t in seq]
    every = {**settings, **{name: [h] for name, h in BASES.items()}}
    rests = [entries(t)[1] for t in tokens]
    if any(pi < 1e-6 or not 0 < mu < 20 * pi for pi, mu in rests):  # one minus a sum of float32 numbers
        return False
    clauses = [c for name, several in every.items() for h in several for t in tokens for c in MASKS[name](t, tokens, h)]
    return all(far > RELATIVE or (ties and far == 0) for _, far in clauses)


def draw_sequence(rng: np.random.RandomState, length: int, recipe: tuple, ties: bool) -> list[dict]:
    settings = TIES if ties else SETTINGS
    while True:
        seq: list[dict] = []
        while len(seq) < length:
            token = draw_token(rng, *recipe)
            if well_posed([token], settings, ties):
                seq.append(token)
        if well_posed(seq, settings, ties):
            return seq


def draw_case(seed: int, name: str) -> dict[str, np.ndarray]:
    """Two columns of padding between the sequences of a row; every fifth column of the longer ones is a hole."""
    rng = np.random.RandomState(seed)
    outside = draw_token(rng, FAR, None, None)
    case = {key: np.full((ROWS, LENGTH, *x.shape), x) for key, x in outside.items()}
    case |= {"mask": np.zeros((ROWS, LENGTH), bool), "segments": rng.randint(4, size=(ROWS, LENGTH)).astype(np.int32)}
    for b, row in enumerate(LAYOUT[name]):
        start = 0
        for segment, columns, *recipe in row:
            at = [start + i for i in range(columns) if columns < 15 or i % 5 != 3]
            for t, token in zip(at, draw_sequence(rng, len(at), tuple(recipe), name == "ties"), strict=True):
                case["mask"][b, t], case["segments"][b, t] = True, segment
                for key, x in token.items():
                    case[key][b, t] = x
            start += columns + 2
    if name == "rows":
        del case["segments"]
    return case


def check_that_masks_act(inputs: dict[str, np.ndarray]) -> None:
    """Under the tight settings every mask fires and keeps something, and each of its clauses fires alone somewhere."""
    sequences = [seq for name in ("packed", "rows", "tokens") for _, seq in sequences_of(case_of(inputs, name))]
    for name, several in SETTINGS.items():
        fired = [[fires for fires, _ in MASKS[name](t, seq, several[-1])] for seq in sequences for t in seq]
        assert any(not any(f) for f in fired), f"{name} keeps nothing"
        assert (len(fired[0]) == 0) == (name in NEVER_MASKED), name
        for i in range(len(fired[0])):
            assert any(f[i] and sum(f) == 1 for f in fired), f"{name}: clause {i} never decides"
    h = SETTINGS["cppo"][-1]
    low, high = h["delta_budget"], 2 * h["delta_budget"]
    budgets = [budget(seq, h) for seq in sequences]
    assert low in budgets and high in budgets and any(low < b < high for b in budgets), "a clip of CPPO's budget"


def case_of(inputs: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.split("/")[1]: x for key, x in inputs.items() if key.startswith(name + "/")}


def draw_inputs() -> dict[str, np.ndarray]:
    found = {}
    for seed, name in enumerate(LAYOUT, start=11):
        found |= {f"{name}/{key}": x for key, x in draw_case(seed, name).items()}
    check_that_masks_act(found)
    rng = np.random.RandomState(15)
    found["reward/rewards"] = np.concatenate([rng.randint(2, size=6), rng.standard_normal(6)]).astype(np.float32)
    found["reward/group"] = rng.permutation(np.repeat(np.arange(4), 3)).astype(np.int32)
    lengths = np.array([[7, 5, 3, 7, 1, 2], [4, 0, 0, 0, 6, 2], [0, 0, 0, 0, 0, 0]])
    found["weights/mask"] = np.arange(7) < lengths[..., None]
    found["weights/mask"][0, 3, 2] = False  # a hole
    found["weights/group"] = np.array([[0, 1, 0, 2, 1, 2], [0, 1, 0, 1, 2, 2], [0, 0, 1, 1, 2, 2]], np.int32)
    found["overlong/lengths"] = np.arange(50, dtype=np.int32)
    return found


OVERLONG = [dict(limit=40, buffer=10), dict(limit=45, buffer=45), dict(limit=30, buffer=1)]
CONSTANT = 7.0


def prompt_mean_token_mean(mask: np.ndarray, group: np.ndarray) -> np.ndarray:
    """1 / (prompts with a token * tokens of the prompt's responses) on each token."""
    tokens = {g: sum(int(mask[b].sum()) for b in range(len(mask)) if group[b] == g) for g in set(group.tolist())}
    prompts = sum(1 for n in tokens.values() if n > 0)
    out = np.zeros(mask.shape)
    for b, t in np.argwhere(mask):
        out[b, t] = 1 / (prompts * tokens[int(group[b])])
    return out


def overlong(length: int, limit: int, buffer: int) -> float:
    if length <= limit - buffer:
        return 0.0
    return (limit - buffer - length) / buffer if length <= limit else -1.0


def answers(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name in LAYOUT:
        values = reference(case_of(inputs, name), TIES if name == "ties" else SETTINGS)
        found |= {f"{name}/{key}": x for key, x in values.items()}
    found["reward/reward"] = inputs["reward/rewards"].astype(np.float64)
    each = zip(inputs["weights/mask"], inputs["weights/group"], strict=True)
    found["weights/prompt_mean_token_mean"] = np.stack([prompt_mean_token_mean(m, g) for m, g in each])
    lengths = inputs["overlong/lengths"].tolist()
    found["overlong/penalty"] = np.array([[overlong(n, **h) for n in lengths] for h in OVERLONG])
    values = dict(settings=SETTINGS, ties=TIES, bases=BASES, strengths=STRENGTHS, overlong=OVERLONG, constant=CONSTANT)
    return found | {f"json/{key}": np.array(json.dumps(value)) for key, value in values.items()}


def check() -> list[str]:
    """The names whose stored values differ. Answers are recomputed from the stored inputs."""
    with np.load(FILE) as file:
        stored = dict(file)
    inputs = draw_inputs()
    if missing := sorted(inputs.keys() - stored.keys()):
        return missing
    made = inputs | answers({name: stored[name] for name in inputs})
    names = made.keys() | stored.keys()
    return sorted(n for n in names if n not in made or n not in stored or not same(stored[n], made[n]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored file instead of writing it")
    if not parser.parse_args().check:
        inputs = draw_inputs()
        np.savez_compressed(FILE, **inputs, **answers(inputs))
        print(f"wrote {FILE} ({FILE.stat().st_size / 1e3:.0f} kB)")
    elif differing := check():
        sys.exit(f"{FILE.name} differs from what its script makes: {', '.join(differing)}")
    else:
        print(f"{FILE.name}: as its script makes it")


if __name__ == "__main__":
    main()
