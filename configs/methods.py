"""Every method as one row: what is not configs/quickstart.py, the embedded default, and where it comes from.

    python -m experiments.train --config configs/methods.py:gspo --workdir runs/gspo

docs/methods.md is made of these rows; the cap, the anchor and the other numbers there are read off the loss.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import quickstart
from dppo_jax.errors import lookup

INF = float("inf")


class Method(NamedTuple):
    """What a method is. Symbols are those of docs/methods.md."""

    title: str
    formula: str  # the coefficient of grad log pi
    masked: str  # when
    source: str  # the arXiv number, where there is one
    note: str  # what the source sets, and what is ours
    sets: Mapping[str, Any] = {}  # config key: its value, or a function of the config; loss.name: the row's, if unset


REGION, CORRECTED = "M min(r, C) A", "M (π/π′) ρ A"
CLIP, CLIP_PROXIMAL = "A>0: r > 1+ε_high; A<0: r < 1−ε_low", "A>0: π/π′ > 1+ε_high; A<0: π/π′ < 1−ε_low"
TAIL = "over TopK ∪ {sampled} ∪ {rest}"
QI, LIU = "Qi et al., 2602.04879", "Liu, Li et al., 2025, When speed kills stability"
DIS = "Hou et al., 2607.07508, section 3.1"
SAO = "The advantages are those of the paper's GRPO with DIS; SAO itself has one response to a prompt and a critic."
DELTA, ANCHOR = "δ and C: section 7 and appendix E.", "The ablation of the anchor (Figure 4)."
EXACT = "δ: that of its estimates. Costs one more forward pass and two more through the head."
GROWS, ZHOU = "the update makes it grow", "Zhou et al., 2607.10848"
TAILS = "δ: DPPO's. `tail`: how the rest's mass lies on its tokens, evenly (uniform) or as one token (aggregated)."
RELAXED = "Which bound holds back low-probability tokens (Figures 6 and 7). α is ours: the paper sweeps it."
GROUP_STD, UNCAPPED = {"advantage.name": "group_mean_std"}, {"loss.ratio_cap": INF}
SEQUENCE = {"aggregation.name": "seq_mean_token_mean"}
ON_POLICY = {"aggregation.name": "seq_mean_token_sum", "train.epochs": 1, "train.minibatches": 1}

METHODS = {
    # No trust region
    "reinforce": Method(
        "REINFORCE", "A", "none", "Williams, 1992",
        "One update a batch: the data is on-policy. No baseline: `reward` is R itself.",
        {"advantage.name": "reward", **ON_POLICY},
    ),
    "rloo": Method(
        "RLOO", "A", "none", "Ahmadian et al., 2402.14740, equation 6",
        "The paper: 2 or 4 responses to a prompt, whole responses as actions, on-policy; its KL penalty is part of the "
        "reward.",
        {"loss.name": "reinforce", "advantage.name": "leave_one_out", **ON_POLICY},
    ),
    "pg_is": Method(
        "PG-IS", "r A", "none", f"{QI}, section 5", "The ablation without a trust region and without truncation."
    ),
    "pg_tis": Method(
        "PG-TIS", "min(r, C) A", "none", f"{QI}, section 5",
        "The ablation without a trust region, with section 5's cap.",
        {"loss.name": "cispo", "loss.ratio_cap": 3.0},
    ),
    "cispo": Method(
        "CISPO (PG-TIS)", "min(r, C) A", "none", "MiniMax-M1, 2506.13585, equations 4 and 5",
        "The report gives no number for C; this is that of 2602.04879, section 7.",
        {"loss.ratio_cap": 5.0, **GROUP_STD},
    ),
    "scale_rl": Method(
        "ScaleRL", "min(r, C) A", "none", "Khatri et al., 2510.13786, section 4",
        "The paper: learning rate 5e-7, 48 prompts × 16, C from 4 to 8, 8 batches off-policy (train.staleness has 1).",
        {
            "loss.name": "cispo", "loss.ratio_cap": 5.0, "advantage.name": "batch_norm", "advantage.drop_equal": True,
            "aggregation.name": "prompt_mean_token_mean", "policy.head_float32": True,
        },
    ),
    # The ratio of a token
    "ppo": Method(
        "PPO with a critic", REGION, CLIP, "Schulman et al., 1707.06347, equation 7; GAE, 1506.02438",
        "The paper: ε 0.2, λ 0.95, discount 0.99 (1 here: the reward comes once, at the end). The critic's learning "
        "rate is ours: a value head from zero, in few steps.",
        {"loss.name": "ppo_clip", **UNCAPPED, "advantage.name": "gae", "critic.learning_rate": 1e-3},
    ),
    "grpo": Method(
        "GRPO", f"{REGION} + β(ref/π − 1)", CLIP, "Shao et al., 2402.03300, equations 3 and 4",
        "The paper: learning rate 1e-6, 64 responses to a question, batches of 1,024, this β, one update a batch.",
        {"loss.name": "ppo_clip", **UNCAPPED, **GROUP_STD, **SEQUENCE, "reference.coef": 0.04},
    ),
    "dr_grpo": Method(
        "Dr. GRPO", REGION, CLIP, "Liu et al., 2503.20783, section 3.2",
        "The paper: no standard deviation, a fixed denominator (here the longest response), no reference, learning "
        "rate 1e-6, 8 responses, 128 questions.",
        {
            "loss.name": "ppo_clip", **UNCAPPED, "aggregation.name": "seq_sum_const",
            "aggregation.constant": lambda c: float(c.rollout.max_new_tokens),
        },
    ),
    "max_rl": Method(
        "MaxRL", f"{REGION} with A = (R−mean)/mean", CLIP, "Tajwar et al., 2602.02710",
        "For rewards of 0 and 1. The clip is PPO's: the advantage is the method.",
        {"loss.name": "ppo_clip", **UNCAPPED, "advantage.name": "max_rl"},
    ),
    "clip_higher": Method(
        "GRPO with Clip-Higher", REGION, CLIP, "DAPO, 2503.14476, equation 10; 2602.04879, section 7",
        "The baseline of 2602.04879, with its numbers.",
        {"loss.eps_low": 0.2, "loss.eps_high": 0.27},
    ),
    "dapo": Method(
        "DAPO", REGION, CLIP, "Yu et al., 2503.14476, equations 8 to 13",
        "The paper: learning rate 1e-6, 512 prompts × 16, 16 updates a batch, 4,096 of 20,480 tokens as the buffer.",
        {
            "loss.name": "clip_higher", "loss.eps_low": 0.2, "loss.eps_high": 0.28, **UNCAPPED, **GROUP_STD,
            "rollout.resample": 8, "reward.overlong_buffer": lambda c: c.rollout.max_new_tokens // 5,
        },
    ),
    "bypass": Method(
        "Bypass: rollout log-probabilities as the old policy", REGION, CLIP, "PPO, 1707.06347, equation 7, on μ",
        "No pass at the rollout's parameters: the ratio holds staleness and mismatch alike.",
        GROUP_STD,
    ),
    "dual_clip": Method(
        "Dual-clip PPO", REGION, "PPO's, and A<0: r > c", "Ye et al., 1912.09729, equation 5",
        "ε and c (`dual_cap`): the paper's.",
        GROUP_STD,
    ),
    "relax_low": Method(
        "Relaxed clip, lower", REGION, "Clip-Higher's, its lower bound lifted where μ < α", f"{QI}, section 6", RELAXED,
        {"loss.alpha": 0.1},
    ),
    "relax_high": Method(
        "Relaxed clip, upper", REGION, "Clip-Higher's, its upper bound lifted where μ < α", f"{QI}, section 6", RELAXED,
        {"loss.alpha": 0.1},
    ),
    "relax_both": Method(
        "Relaxed clip, both", REGION, "Clip-Higher's, its bounds lifted where μ < α", f"{QI}, section 6", RELAXED,
        {"loss.alpha": 0.1},
    ),
    "sapo": Method(
        "SAPO", "4g(1−g) r A, g = σ(τ(r−1))", "none: a soft gate", "Gao et al., 2511.20347",
        "τ_high where A>0, τ_low where A<0.",
        {**GROUP_STD, **SEQUENCE},
    ),
    "kimi_k25": Method(
        "Kimi K2.5's loss", "M r A − 2τ log r", "r outside [1−ε_low, 1+ε_high]", "Kimi K2.5 technical report, 2026",
        "The report gives no numbers: these are ours.",
    ),
    "alp": Method(
        "Adaptive layerwise perturbation", f"{REGION} with a perturbed π", CLIP, "Ye et al., 2603.19470",
        "Gaussian noise on every layer's input in training; σ per layer is learned. In place of corrections by π′, not "
        "beside them. The first σ and its learning rate are ours.",
        {"loss.name": "ppo_clip", **GROUP_STD, "alp.sigma": 1e-3},
    ),
    # The recomputed policy
    "minirl": Method(
        "MiniRL", REGION, CLIP_PROXIMAL, f"{QI}, section 5",
        "The mask on the recomputed policy, the weight on the behavior policy.",
    ),
    "minirl_tis": Method(
        "MiniRL-TIS", REGION, CLIP_PROXIMAL, f"{QI}, section 5", "As MiniRL, with a truncated weight."
    ),
    "ppo_clip_recomputed": Method(
        "PPO on the recomputed policy", "M min(π/π′, C) A", CLIP_PROXIMAL, "PPO, 1707.06347, equation 7, on π′",
        "The mismatch π′/μ is left uncorrected: the control of the next five.",
        GROUP_STD,
    ),
    "token_tis": Method(
        "Token-level truncated importance sampling", "M (π/π′) min(ρ, C) A", "PPO's on π/π′",
        "Yao et al., 2025, Your efficient RL framework secretly brings you off-policy RL training", "",
        GROUP_STD,
    ),
    "sequence_tis": Method(
        "Sequence-level truncated importance sampling", "M (π/π′) min(Πρ, C) A", "PPO's on π/π′", LIU,
        "The product over the response.",
        GROUP_STD,
    ),
    "token_mis": Method(
        "Token-level masked importance sampling", CORRECTED, "PPO's on π/π′, and ρ > C", LIU, "", GROUP_STD
    ),
    "sequence_mis": Method(
        "Sequence-level masked importance sampling", "M (π/π′) Πρ A", "PPO's on π/π′, and Πρ > C", LIU,
        "A whole response is dropped.",
        GROUP_STD,
    ),
    "icepop": Method(
        "IcePop", CORRECTED, "PPO's on π/π′, and ρ outside [low, high]", "Ring-1T, 2510.18855",
        "The report's bounds on ρ.",
        GROUP_STD,
    ),
    # A whole response
    "gspo": Method(
        "GSPO", "M s A, s = exp(mean log r)", "A>0: s > 1+ε_high; A<0: s < 1−ε_low",
        "Zheng et al., 2507.18071, equations 5 to 7", "The paper: these ε, 4 minibatches.",
        {**GROUP_STD, **SEQUENCE},
    ),
    "deepseek_v32": Method(
        "DeepSeek-V3.2's off-policy sequence mask", REGION, "PPO's, and the response where A<0 and mean log(μ/π) > δ",
        "2512.02556, section 3.1", "The report gives no δ; ours.",
        GROUP_STD,
    ),
    "trm_max": Method(
        "Trust-region masking, largest divergence", REGION, "the response where max log(r)²/2 > δ",
        "Li et al., 2512.23075", "δ is ours.",
    ),
    "trm_mean": Method(
        "Trust-region masking, mean divergence", REGION, "the response where mean (r−1−log r) > δ",
        "Li et al., 2512.23075", "δ is ours.",
    ),
    "vaco": Method(
        "VACO", REGION, "where A(r−1) > 0, if the response's mean |r−1|/2 > δ", "2603.01365, algorithm 1",
        "For language models, with a response as the batch whose TV is measured; δ is ours.",
    ),
    "cppo": Method(
        "CPPO", REGION, "A(r−1) > 0 and w_t|π−μ| > min(δ, what the prefix has left)",
        "Mao et al., 2606.10968, equations 8 to 11", "w_t falls from 1 to `w_min` along the response.",
    ),
    "geometric_mask": Method(
        "Geometric rejection", REGION, "the response where exp(mean log r) is outside [1−ε_low, 1+ε_high]", LIU,
        "ε and C: verl's preset of geometric rejection with truncated weights of tokens.",
        GROUP_STD,
    ),
    "flash_reinforce": Method(
        "FlashREINFORCE", f"{REGION} with A = R − the batch's mean", "the response where mean KL(Bern μ‖Bern π) > δ",
        "Hu et al., 2607.21653 (Molt)",
        "Rejected responses stay in the denominators. The examples: 128 prompts, one response to each, learning rate "
        "1e-6, one update a batch, batches in flight (rollout.in_flight).",
        {"advantage.name": "batch_mean", **SEQUENCE, "train.epochs": 1, "train.minibatches": 1},
    ),
    "vespo": Method(
        "VESPO", "W^k exp(λ(1−W)) A, W = Πr", "none: a soft weight", "2602.10693, equation 20",
        "`*_high` where A≥0, `*_low` where A<0. As in the paper's code: GRPO's advantage, the mean over tokens.",
        GROUP_STD,
    ),
    "gmpo": Method(
        "GMPO", "M s A, s = exp(mean of log r, clipped as M)", "A>0: log r > ε_high; A<0: log r < −ε_low",
        "Zhao et al., 2507.20673", "ε is of log r: ratios from e^−0.4 to e^0.4.",
        {**GROUP_STD, **SEQUENCE},
    ),
    "minpro": Method(
        "MinPRO", "clip(r_t min_{i<t} r_i, 1−ε_low, 1+ε_high) A", "none", "Lei et al., 2601.22718",
        "ε is ours: no lower bound, and CISPO's upper one.",
        GROUP_STD,
    ),
    "m2po": Method(
        "M2PO", REGION, "A(r−1) > 0: the largest log(r)², until the mean over the response's others of these is ≤ δ",
        "Zheng et al., 2510.01161",
        "δ: the paper's, whose mean is over a batch. A loss sees no batch: here it is over each response.",
        GROUP_STD,
    ),
    "estr": Method(
        "ESTR", REGION, "PPO's, and log(r)² > δ(H + ε_H), H the entropy of μ at the token", "Zhao et al., 2607.22186",
        "ε_H (`entropy_floor`) is the paper's; δ is ours. The rollout records H.",
        GROUP_STD,
    ),
    # The divergence at a token
    "dppo_binary_tv": Method(
        "DPPO, binary TV", REGION, "moving away and |π−μ| of the sampled token > δ", f"{QI}, section 4", DELTA
    ),
    "bpco": Method(
        "BPCO", REGION, "A>0: π−μ > δ; A<0: μ−π > δ", "Qi, Zhou, Lee, 2608.23566",
        "A bounded critic, trained on what responses earn; λ = 1 − 1/(0.4 L), no whitening, one response a prompt. The "
        "paper's code: learning rates 1e-6 and 5e-6 (critic), 1,024 prompts, 4 updates a batch, sums over tokens, "
        "values clipped to 0.5. The critic's learning rate is ours.",
        {
            "loss.name": "dppo_binary_tv", "advantage.name": "gae", "aggregation.name": "seq_mean_token_sum",
            "rollout.prompts": lambda c: c.rollout.prompts * c.rollout.group_size, "rollout.group_size": 1,
            "critic.bounds": (0.0, 1.0), "critic.targets": "monte_carlo", "critic.lam_alpha": 0.4,
            "critic.whiten": False, "critic.value_clip": 0.5, "critic.learning_rate": 1e-3,
        },
    ),
    "dppo_binary_kl": Method(
        "DPPO, binary KL", REGION, "moving away and KL(Bern μ‖Bern π) > δ", f"{QI}, section 4", DELTA
    ),
    "dppo_topk_tv": Method("DPPO, top-K TV", REGION, f"moving away and TV {TAIL} > δ", f"{QI}, section 4", DELTA),
    "dppo_topk_kl": Method("DPPO, top-K KL", REGION, f"moving away and KL {TAIL} > δ", f"{QI}, section 4", DELTA),
    "dppo_exact_tv": Method(
        "DPPO, exact TV", REGION, "moving away and TV over the vocabulary > δ", "what 2602.04879 estimates", EXACT
    ),
    "dppo_exact_kl": Method(
        "DPPO, exact KL", REGION, "moving away and KL over the vocabulary > δ", "what 2602.04879 estimates", EXACT
    ),
    "pdm_topk_tv": Method(
        "Predictive divergence mask, top-K TV", REGION, f"TV {TAIL} > δ, and {GROWS}", ZHOU,
        "The paper has KL; the slope of TV is ours, and knows no signs within the rest. " + TAILS,
    ),
    "pdm_topk_kl": Method(
        "Predictive divergence mask, top-K KL", REGION, f"KL {TAIL} > δ, and {GROWS}", ZHOU, TAILS
    ),
    "pdm_exact_tv": Method(
        "Predictive divergence mask, exact TV", REGION, f"TV over the vocabulary > δ, and {GROWS}", ZHOU,
        "The paper has KL; the slope of TV is ours. " + EXACT,
    ),
    "pdm_exact_kl": Method(
        "Predictive divergence mask, exact KL", REGION, f"KL over the vocabulary > δ, and {GROWS}", ZHOU, EXACT
    ),
    "dppo_binary_tv_proximal": Method(
        "DPPO, binary TV, recomputed anchor", REGION, "moving away from π′ and its |π−π′| of the sampled token > δ",
        f"{QI}, section 5.2", ANCHOR,
    ),
    "dppo_binary_kl_proximal": Method(
        "DPPO, binary KL, recomputed anchor", REGION, "moving away from π′ and its KL(Bern π′‖Bern π) > δ",
        f"{QI}, section 5.2", ANCHOR,
    ),
    "dppo_topk_tv_proximal": Method(
        "DPPO, top-K TV, recomputed anchor", REGION, f"moving away from π′ and its TV {TAIL} > δ",
        f"{QI}, section 5.2", ANCHOR,
    ),
    "dppo_topk_kl_proximal": Method(
        "DPPO, top-K KL, recomputed anchor", REGION, f"moving away from π′ and its KL {TAIL} > δ",
        f"{QI}, section 5.2", ANCHOR,
    ),
    "binary_tv_unsigned": Method(
        "Binary TV without the sign of A", REGION, "|π−μ| > δ", "the rule of prime-rl's IPO loss",
        "δ as the signed one; prime-rl has 0.3 since September 2026, when IPO is its default.",
    ),
    "kpop": Method(
        "KPop", REGION, "KL(Bern μ‖Bern π) > δ or KL(Bern π‖Bern μ) > δ", "both binary KLs, sign-free", ""
    ),
    "drpo": Method(
        "DRPO", "min(r, C) A [1 − sign(A)(π−μ)/δ]", "none: a linear weight", "Yao et al., 2606.09821, table 1",
        "δ: section 4 of the paper; at that size it is nearly PG-IS on single probabilities.",
    ),
    "minimal_mask": Method("Minimal mask", REGION, "A<0: μ−π ≥ δ", f"{QI}, section 5.3", "The paper's 0.8 fails."),
    # Bands, and weights that differ by the sign of A
    "dis_math": Method(
        "DIS, mathematics", REGION, "r outside (1−ε_low, 1+ε_high)", DIS, f"A band from 0.7 to 6. {SAO}",
        {"loss.name": "dis", "loss.eps_low": 0.3, "loss.eps_high": 5.0, **GROUP_STD},
    ),
    "dis_coding": Method(
        "DIS, coding", REGION, "r outside (1−ε_low, 1+ε_high)", DIS, f"A band from 0.2 to 4. {SAO}",
        {"loss.name": "dis", "loss.eps_low": 0.8, "loss.eps_high": 3.0, **GROUP_STD},
    ),
    "ripo": Method(
        "RIPO", REGION, "A>0: r > min(1+ε, ratio_high); A<0: r < max(1−ε, ratio_low); ε = √(budget/μ)",
        "Cai et al., 2607.10169", "The paper: this budget, 8 responses to a prompt, no reference.",
        GROUP_STD,
    ),
    "aspo": Method(
        "ASPO", "M min(w, C) A, w = 1/r where A>0, else r", CLIP, "Wang et al., 2510.06062",
        "ε: the paper's. It gives no number for C, which both signs have: that of dual-clip PPO. Its reference is left "
        "out.",
        GROUP_STD,
    ),
    "up": Method(
        "UP", "A>0: A; A<0: M min(r, C) A", "A<0: r < 1−ε_low", "Fan et al., 2607.06987, equation 15",
        "UP-DAPO, without DAPO's resampling and its buffer.",
        GROUP_STD,
    ),
    "prime_rl": Method(
        "prime-rl's DPPO", "M r A − 2τ log r", "A>0: π−μ > δ; A<0: μ−π > δ", "prime-rl, default_loss_fn, 2026",
        "Its default loss from April to August 2026, with these numbers; then IPO, without the sign of A.",
    ),
    # Another model in the place of rewards
    "distill": Method(
        "On-policy distillation", "M min(r, C) log(π_T/π)", "π_T < π and μ−π > δ", "Agarwal et al., 2306.13649",
        "π_T is the teacher, on the policy's own responses: the reverse KL. No reward is looked at. r, the mask and δ "
        "are ours. The teacher named here is what the first command of experiments/recipes/distillation makes.",
        {"advantage.name": "reward", "teacher.path": "runs/teacher/policy"},
    ),
}  # fmt: skip
ARGUMENTS = tuple(METHODS)  # what get_config takes, for the command line's refusals


def loss_of(name: str) -> str:
    """The loss that a method trains. UserError for an unknown name."""
    return lookup(METHODS, name, "method").sets.get("loss.name", name)


def set_method(c: ConfigDict, name: str) -> None:
    """Makes a config one of this method; model, data and sizes stay. UserError for an unknown name."""
    sets = {"loss.name": name, **lookup(METHODS, name, "method").sets}
    c.update_from_flattened_dict({key: value(c) if callable(value) else value for key, value in sets.items()})


def get_config(name: str):
    c = quickstart.get_config()
    set_method(c, name)
    return c
