"""Gemma-2-9B-It on prompts of UltraFeedback, rewarded by Skywork-Reward-Llama-3.1-8B (2602.04879, section 7.2).

    python -m experiments.train --config configs/paper/gemma2_9b_ultrafeedback.py --workdir runs/gemma2_9b --distributed

Everything comes from the hub by name; google/gemma-2-9b-it asks for its terms to be accepted, and for HF_TOKEN. Rows
have no answers: the reward is the reward model's score, less a KL from the first policy. Batch, lengths, the KL's
coefficient and the mesh are ours. Not run by us, nor compiled.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.policy.path = "google/gemma-2-9b-it"
    c.policy.dtype = "bfloat16"
    c.policy.remat = "full"
    c.policy.matmul = "default"
    c.data.kind = "hub"
    c.data.name = "trl-lib/ultrafeedback-prompt"
    c.data.verifier = "none"
    c.data.chat = True
    c.data.max_prompt_len = 1024
    c.data.too_long = "skip"
    c.rollout.prompts = 128
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 1024
    c.rollout.dtype = "bfloat16"
    c.reward.terms.correct = 0.0
    c.reward.terms.model = 1.0
    c.reward.model.path = "Skywork/Skywork-Reward-Llama-3.1-8B"
    c.reward.model.dtype = "bfloat16"
    c.reward.model.max_len = 4096  # its own tokens of prompt and reply
    c.reward.model.rows = 64
    c.reward.kl_coef = 0.01
    c.train.minibatches = 4
    c.steps = 300
    c.checkpoint.every = 10
    c.mesh.fsdp = 8
    c.mesh.tensor = 2
    return c
