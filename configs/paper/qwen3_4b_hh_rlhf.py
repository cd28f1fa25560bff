"""Qwen3-4B-Instruct on prompts of HH-RLHF, rewarded by Skywork-Reward-Llama-3.1-8B (2602.04879, section 7.2).

    python -m experiments.train --config configs/paper/qwen3_4b_hh_rlhf.py --workdir runs/hh_rlhf --distributed

The settings of gemma2_9b_ultrafeedback. The prompts are conversations that end where the assistant is to answer, from
TRL's form of the helpful part, since Anthropic's own rows hold whole dialogues as text. Not run by us.
"""

from configs.paper import gemma2_9b_ultrafeedback


def get_config():
    c = gemma2_9b_ultrafeedback.get_config()
    c.policy.path = "Qwen/Qwen3-4B-Instruct-2507"
    c.data.name = "trl-lib/hh-rlhf-helpful-base"
    return c
