"""Reference values for losses, divergences, advantages and aggregation weights.

Float64, one token at a time, from the definitions: probabilities, explicit sums, explicit sets. Imports nothing
of dppo_jax. The inputs are rounded to float32 first, so both sides see the same numbers.

    python tests/golden/losses/make_losses.py            # writes losses.npz beside this file
    python tests/golden/losses/make_losses.py --check    # regenerates; non-zero status where the file differs
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("losses.npz")
VOCABULARY, ROWS, LENGTH = 48, 6, 40
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
INF = math.inf

CLIP = [dict(eps_low=0.2, eps_high=0.28, ratio_cap=3.0), dict(eps_low=0.5, eps_high=0.1, ratio_cap=INF)]
TV = [dict(delta_low=0.15, delta_high=0.05, ratio_cap=5.0), dict(delta_low=0.01, delta_high=0.3, ratio_cap=INF)]
KL = [dict(delta_low=0.05, delta_high=0.02, ratio_cap=5.0), dict(delta_low=0.001, delta_high=0.4, ratio_cap=INF)]
RELAX = [{**CLIP[0], "alpha": 0.3}, {**CLIP[1], "alpha": 0.01}]
SETTINGS = {
    "pg_is": [dict(ratio_cap=INF), dict(ratio_cap=2.0)],
    "cispo": [dict(ratio_cap=3.0), dict(ratio_cap=0.9)],
    "ppo_clip": CLIP,
    "clip_higher": CLIP,
    "minirl": CLIP[::-1],
    "minirl_tis": CLIP,
    "dppo_binary_tv": TV,
    "dppo_binary_kl": KL,
    "dppo_topk_tv": TV,
    "dppo_topk_kl": KL,
    "dppo_binary_tv_proximal": TV,
    "dppo_binary_kl_proximal": KL,
    "dppo_topk_tv_proximal": TV,
    "dppo_topk_kl_proximal": KL,
    "minimal_mask": [dict(delta_low=0.5, ratio_cap=5.0), dict(delta_low=0.1, ratio_cap=INF)],
    "relax_low": RELAX,
    "relax_high": RELAX,
    "relax_both": RELAX,
}
# Every threshold at zero: where two policies are equal, the statistic equals its threshold.
TIES = {name: [{k: v if k in ("ratio_cap", "alpha") else 0.0 for k, v in s[0].items()}] for name, s in SETTINGS.items()}


# Divergences of the policy from an anchor. A distribution is a list of probabilities of the same events.


def tv(anchor: list[float], policy: list[float]) -> float:
    return 0.5 * sum(abs(a - p) for a, p in zip(anchor, policy, strict=True))


def kl(anchor: list[float], policy: list[float]) -> float:
    """KL(anchor || policy); infinite where the policy gives nothing to what the anchor may draw."""
    total = 0.0
    for a, p in zip(anchor, policy, strict=True):
        if a > 0:
            total += a * math.log(a / p) if p > 0 else INF
    return max(total, 0.0)


def binary(p: float) -> list[float]:
    """The sampled token, and everything else."""
    return [p, 1.0 - p]


def partition(tracked: dict[int, float], sampled: int, p_sampled: float) -> list[float]:
    """TopK ∪ {sampled}, each token once, then the rest in one bucket."""
    ids = sorted(set(tracked) | {sampled})
    each = [tracked[i] if i in tracked else p_sampled for i in ids]
    return [*each, max(0.0, 1.0 - math.fsum(each))]


def divergences(token: dict, anchor: str) -> dict[str, float]:
    b = binary(token[anchor]), binary(token["pi"])
    k = [partition(token["topk_" + w], token["sampled"], token[w]) for w in (anchor, "pi")]
    return {"binary_tv": tv(*b), "binary_kl": kl(*b), "topk_tv": tv(*k), "topk_kl": kl(*k)}


# Losses. A token is masked or not; `margin` is how far its statistic lies from the threshold that applies to it.


def masked(name: str, h: dict, token: dict) -> tuple[bool, float]:
    pi, mu, adv = token["pi"], token["mu"], token["advantage"]
    if name in ("pg_is", "cispo") or adv == 0:
        return False, INF
    up = adv > 0

    if name == "minimal_mask":
        if up:
            return False, INF
        return mu - pi >= h["delta_low"], abs(mu - pi - h["delta_low"])

    if name in ("ppo_clip", "clip_higher", "minirl", "minirl_tis") or name.startswith("relax_"):
        r = token["ratio_prox"] if name.startswith("minirl") else token["ratio"]
        bound = 1 + h["eps_high"] if up else 1 - h["eps_low"]
        out = r > bound if up else r < bound
        margin = abs(r - bound)
        if name.startswith("relax_"):
            sides = {"relax_low": (False,), "relax_high": (True,), "relax_both": (False, True)}[name]
            if up in sides:
                margin = min(margin, abs(mu - h["alpha"]))
                out = out and not mu < h["alpha"]
        return out, margin

    anchor = "prox" if name.endswith("_proximal") else "mu"
    a = token[anchor]
    delta = h["delta_high"] if up else h["delta_low"]
    if name in ("dppo_binary_tv", "dppo_binary_tv_proximal"):
        signed = pi - a if up else a - pi
        return signed > delta, abs(signed - delta)
    statistic = divergences(token, anchor)[name.removeprefix("dppo_").removesuffix("_proximal")]
    away = pi > a if up else pi < a
    return away and statistic > delta, min(abs(statistic - delta), abs(pi - a) if statistic > delta else INF)


def coefficient(name: str, h: dict, token: dict) -> tuple[float, bool, float]:
    """(M * min(pi / mu, C) * A, M, margin)."""
    out, margin = masked(name, h, token)
    return (0.0 if out else min(token["ratio"], h["ratio_cap"]) * token["advantage"]), not out, margin


def tokens_of(case: dict) -> dict[tuple[int, int], dict]:
    """The tokens inside the mask, by position, with probabilities in float64."""
    found = {}
    for b, t in np.argwhere(case["mask"]):
        ids = case["topk_ids"][b, t].tolist()
        logp, behavior, proximal = (float(case[k][b, t]) for k in ("logp", "behavior_logp", "proximal_logp"))
        token = {
            "pi": math.exp(logp),
            "mu": math.exp(behavior),
            "prox": math.exp(proximal),
            "ratio": math.exp(logp - behavior),
            "ratio_prox": math.exp(logp - proximal),
            "advantage": float(case["advantages"][b, t]),
            "sampled": int(case["sampled"][b, t]),
        }
        for key, source in (("pi", "topk_logp"), ("mu", "topk_behavior_logp"), ("prox", "topk_proximal_logp")):
            token["topk_" + key] = {i: math.exp(x) for i, x in zip(ids, case[source][b, t].tolist(), strict=True)}
        found[int(b), int(t)] = token
    return found


def reference(case: dict, settings: dict) -> dict[str, np.ndarray]:
    """coef and keep [rows of the settings, B, R]; divergences from either anchor [4, B, R]; 0 outside the mask."""
    rows = [(name, h) for name, several in settings.items() for h in several]
    shape = case["mask"].shape
    coef, keep = np.zeros((len(rows), *shape)), np.zeros((len(rows), *shape), bool)
    from_behavior, from_proximal = np.zeros((4, *shape)), np.zeros((4, *shape))
    for at, token in tokens_of(case).items():
        for i, (name, h) in enumerate(rows):
            coef[i, *at], keep[i, *at], _ = coefficient(name, h, token)
        from_behavior[:, *at] = list(divergences(token, "mu").values())
        from_proximal[:, *at] = list(divergences(token, "prox").values())
    return {"coef": coef, "keep": keep, "from_behavior": from_behavior, "from_proximal": from_proximal}


# Advantages and weights.


def deviation(values: list[float], ddof: int) -> float:
    """Of the population (0) or of a sample (1)."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - ddof))


def advantages(rewards: np.ndarray, group: np.ndarray) -> dict[str, np.ndarray]:
    r = rewards.astype(np.float64)
    mates = [[r[j] for j in range(len(r)) if group[j] == group[i]] for i in range(len(r))]
    mean = [sum(m) / len(m) for m in mates]
    centred = [x - mu for x, mu in zip(r, mean, strict=True)]
    std = [[deviation(m, ddof) for m in mates] for ddof in (0, 1)]
    batch_std = [deviation(centred, ddof) for ddof in (0, 1)]
    rows = range(len(r))
    return {
        "group_mean": np.array(centred),
        "group_mean_std": np.array([centred[i] / (std[0][i] + 1e-6) for i in rows]),
        "group_mean_std_ddof1": np.array([centred[i] / (std[1][i] + 1e-6) for i in rows]),
        "leave_one_out": np.array([r[i] - (sum(mates[i]) - r[i]) / (len(mates[i]) - 1) for i in rows]),
        "max_rl": np.array([centred[i] / mean[i] if mean[i] > 0 else 0.0 for i in rows]),
        "batch_norm": np.array([c / (batch_std[0] + 1e-6) for c in centred]),
        "batch_norm_ddof1": np.array([c / (batch_std[1] + 1e-6) for c in centred]),
        "batch_mean": np.array([x - sum(r) / len(r) for x in r]),
    }


def gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, discount: float, lam: float) -> np.ndarray:
    """sum_k (discount lam)^k (r_{t+k} + discount V_{t+k+1} - V_{t+k}) over a row's masked positions, one after another;
    V = 0 past the last."""
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        at = np.flatnonzero(row)
        r, v = rewards[b, at].astype(np.float64), [*values[b, at].astype(np.float64), 0.0]
        errors = [r[t] + discount * v[t + 1] - v[t] for t in range(len(at))]
        for t in range(len(at)):
            out[b, at[t]] = sum((discount * lam) ** (s - t) * errors[s] for s in range(t, len(at)))
    return out


def weights(mask: np.ndarray, constant: float) -> dict[str, np.ndarray]:
    names = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_const")
    out = {name: np.zeros(mask.shape) for name in names}
    rows = sum(1 for row in mask if row.any())
    for b, t in np.argwhere(mask):
        out["token_mean"][b, t] = 1 / mask.sum()
        out["seq_mean_token_mean"][b, t] = 1 / (rows * mask[b].sum())
        out["seq_mean_token_sum"][b, t] = 1 / rows
        out["seq_sum_const"][b, t] = 1 / (rows * constant)
    return out


# Inputs. RandomState, because its stream never changes between releases of NumPy.


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - math.log(math.fsum(np.exp(x)))


def well_posed(token: dict, settings: dict) -> bool:
    """Every statistic on its threshold or 1e-5 away from it, and no divergence that hangs on the inputs' last bits: the
    rest is one minus a sum of float32 numbers, so where it is tiny under the policy only, no float32 answer is right.
    """
    margins = [coefficient(name, h, token)[2] for name, several in settings.items() for h in several]
    rest = {w: partition(token["topk_" + w], token["sampled"], token[w])[-1] for w in ("pi", "mu", "prox")}
    finite = all(d < INF for anchor in ("mu", "prox") for d in divergences(token, anchor).values())
    return all(m == 0 or m > 1e-5 for m in margins) and finite and max(rest["mu"], rest["prox"]) <= 20 * rest["pi"]


def draw_token(rng: np.random.RandomState, k: int) -> dict[str, np.ndarray]:
    scale, drift = rng.choice([0.5, 2.0, 6.0, 15.0, 30.0]), rng.choice([0.02, 0.2, 0.7, 2.0, 10.0])
    mu = log_softmax(scale * rng.standard_normal(VOCABULARY))
    prox = log_softmax(mu + rng.choice([0.01, 0.1, 0.5]) * rng.standard_normal(VOCABULARY))
    pi = log_softmax(prox + drift * rng.standard_normal(VOCABULARY))
    ids = np.argsort(-mu)[:k]
    sampled = rng.choice([rng.choice(VOCABULARY, p=np.exp(mu)), rng.randint(VOCABULARY), ids[0]])
    adv = rng.standard_normal() * rng.choice([0.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    pick = {"logp": pi, "behavior_logp": mu, "proximal_logp": prox}
    token = {name: np.float32(x[sampled]) for name, x in pick.items()}
    token |= {"topk_" + name: x[ids].astype(np.float32) for name, x in pick.items()}
    return token | {
        "advantages": np.float32(adv),
        "sampled": np.int16(sampled),
        "topk_ids": ids.astype(np.int16),
        "has_sampled": np.bool_(sampled in ids),
    }


def draw_case(seed: int, k: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(seed)
    found: list[dict] = []
    while len(found) < ROWS * LENGTH:
        token = draw_token(rng, k)
        alone = {name: np.asarray(x)[None, None] for name, x in token.items()} | {"mask": np.ones((1, 1), bool)}
        if well_posed(tokens_of(alone)[0, 0], SETTINGS):
            found.append(token)
    case = {name: np.stack([f[name] for f in found]) for name in found[0]}
    case = {name: x.reshape(ROWS, LENGTH, *x.shape[1:]) for name, x in case.items()}
    lengths = np.array([LENGTH, LENGTH - 1, 1, LENGTH - 3, LENGTH - 6, LENGTH])
    return case | {"mask": np.arange(LENGTH) < lengths[:, None]}


def draw_ties(seed: int, k: int) -> dict[str, np.ndarray]:
    """As draw_case, then the three policies made equal on some positions, pairwise or all at once."""
    case = draw_case(seed, k)
    for top in ("", "topk_"):
        pi, mu, prox = (case[top + w] for w in ("logp", "behavior_logp", "proximal_logp"))
        pi[:, 0::4] = mu[:, 0::4]
        pi[:, 1::4] = prox[:, 1::4]
        pi[:, 2::4] = prox[:, 2::4] = mu[:, 2::4]
    for at, token in tokens_of(case).items():
        case["mask"][at] = well_posed(token, TIES)
    return case


def draw_inputs() -> dict[str, np.ndarray]:
    found = {}
    cases = {"k1": draw_case(1, 1), "k3": draw_case(2, 3), "k20": draw_case(3, 20), "ties": draw_ties(4, 3)}
    for c, case in cases.items():
        found |= {f"{c}/{name}": x for name, x in case.items()}

    rng = np.random.RandomState(5)
    found["advantages/group"] = rng.permutation(np.repeat(np.arange(6), [8, 8, 3, 2, 7, 4])).astype(np.int32)
    group = found["advantages/group"]
    found["advantages/rewards"] = np.stack([
        rng.randint(2, size=32) * (group != 1),  # right or wrong, and a group without a success
        rng.standard_normal(32) * 3,
        np.where(group % 2, 0.1, np.where(group == 2, 0.7, rng.random_sample(32))),  # groups of equal rewards
    ]).astype(np.float32)
    found["gae/rewards"], found["gae/values"] = rng.standard_normal((2, 4, 9)).astype(np.float32)
    found["gae/mask"] = np.arange(9) < np.array([9, 4, 1, 0])[:, None]
    drawn = np.random.RandomState(6).standard_normal((2, 5, 9)).astype(np.float32)
    found["gae_holes/rewards"], found["gae_holes/values"] = drawn
    holes = [(0, 1), (3, 4), (7, 8), (0, 2, 3, 4, 7, 8), (0, 1, 2, 4, 5, 6, 7, 8)]  # start, middle, end, all; one token
    found["gae_holes/mask"] = np.array([[t not in row for t in range(9)] for row in holes])
    lengths = np.array([[7, 7, 7, 7], [5, 1, 0, 7], [0, 0, 0, 0]])
    found["weights/mask"] = np.arange(7) < lengths[..., None]
    found["weights/mask"][1, 0, 2] = False  # a hole
    return found


GAE = [dict(discount=1.0, lam=0.95), dict(discount=0.9, lam=1.0), dict(discount=0.99, lam=0.0)]
CONSTANT = 7.0


def answers(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for c in ("k1", "k3", "k20", "ties"):
        case = {name.split("/")[1]: x for name, x in inputs.items() if name.startswith(c + "/")}
        settings = TIES if c == "ties" else SETTINGS
        found |= {f"{c}/{name}": x for name, x in reference(case, settings).items()}
    each = [advantages(r, inputs["advantages/group"]) for r in inputs["advantages/rewards"]]
    found |= {f"advantages/{name}": np.stack([e[name] for e in each]) for name in each[0]}
    for c in ("gae", "gae_holes"):
        arrays = [inputs[f"{c}/{name}"] for name in ("rewards", "values", "mask")]
        found[f"{c}/advantages"] = np.stack([gae(*arrays, **g) for g in GAE])
    each = [weights(m, CONSTANT) for m in inputs["weights/mask"]]
    found |= {f"weights/{name}": np.stack([e[name] for e in each]) for name in each[0]}
    for key, value in (("settings", SETTINGS), ("ties", TIES), ("gae", GAE), ("constant", CONSTANT)):
        found[f"json/{key}"] = np.array(json.dumps(value))
    return found


def same(stored: np.ndarray, made: np.ndarray) -> bool:
    if stored.shape != made.shape or stored.dtype != made.dtype:
        return False
    if made.dtype.kind != "f":
        return bool((stored == made).all())
    tolerance = 1e-6 if made.dtype == np.float32 else 1e-11  # a library's exp may differ in the last bit
    return bool(np.allclose(stored, made, rtol=tolerance, atol=tolerance))


def check() -> list[str]:
    """The names whose stored values differ. Answers are recomputed from the stored inputs."""
    with np.load(FILE) as file:
        stored = dict(file)
    inputs = draw_inputs()
    if missing := sorted(inputs.keys() - stored.keys()):
        return missing
    made = inputs | answers({name: stored[name] for name in inputs})
    return sorted(
        name for name in made.keys() | stored.keys()
        if name not in made or name not in stored or not same(stored[name], made[name])
    )


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
