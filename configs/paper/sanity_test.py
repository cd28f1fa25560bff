"""The paper's sanity test (2602.04879, section 5 and appendix C): 1,460 MATH problems that the policy can solve.

    python -m experiments.train --config configs/paper/sanity_test.py --workdir runs/sanity_dppo
    python -m experiments.train --config configs/paper/sanity_test.py --workdir runs/sanity_pg --config.loss.name=pg_is

Needs the model at policy.path and the problems at data.path, as JSON lines of {prompt, answer}; without them, --trace
checks the config and traces its shapes. Expected in the paper: both DPPO forms near a reward of 1, PG-IS and CISPO
falling after a rise (Figure 3). Not run at this scale by us.
"""

from configs import base

INF = float("inf")


def get_config():
    c = base.get_config()
    c.policy.path = "models/DeepSeek-R1-Distill-Qwen-1.5B"
    c.policy.shape = "configs/paper/deepseek_r1_distill_qwen_1_5b.json"  # typed by hand; policy.path wins
    c.policy.dtype = "bfloat16"
    c.policy.remat = "full"
    c.data.kind = "jsonl"
    c.data.path = "data/math_1460.jsonl"
    c.data.size = 1460
    c.data.verifier = "math_verify"
    c.data.chat = True
    c.data.max_prompt_len = 1024  # ours: the paper gives the whole context, 8,000 tokens
    c.data.too_long = "skip"
    c.rollout.prompts = 64
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 8000 - 1024
    c.rollout.dtype = "bfloat16"
    c.train.minibatches = 4
    c.train.micro_rows = 2  # ours
    c.steps = 500  # ours: the curves of Figure 3 end within it
    c.checkpoint.every = 50  # ours

    # Section 5's thresholds.
    for name in base.DPPO_TV:
        c.loss_defaults[name] = dict(delta_low=0.15, delta_high=0.15, ratio_cap=3.0)
    for name in base.DPPO_KL:
        c.loss_defaults[name] = dict(delta_low=0.05, delta_high=0.05, ratio_cap=3.0)
    higher = dict(eps_low=0.2, eps_high=0.28)
    c.loss_defaults.cispo = dict(ratio_cap=3.0)
    c.loss_defaults.ppo_clip.ratio_cap = 3.0
    c.loss_defaults.clip_higher = dict(**higher, ratio_cap=3.0)
    c.loss_defaults.minirl = dict(**higher, ratio_cap=INF)
    c.loss_defaults.minirl_tis = dict(**higher, ratio_cap=3.0)
    c.loss_defaults.minimal_mask = dict(delta_low=0.5, ratio_cap=3.0)
    return c
