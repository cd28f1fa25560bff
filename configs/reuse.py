"""A trust region under batch reuse: a 2-layer model does chains mod 13, sixteen updates on every rollout batch.

python -m experiments.train --config configs/reuse.py --workdir runs/reuse

Expected: sampled accuracy on held-out chains from about 0.5 to about 0.85 (seeds 0 to 2: 0.84, 0.88, 0.85), while
--config.loss.name=pg_is ends at 0.72, 0.13 and 0.10. Cost: 0.15 s a step on two busy CPU cores, half a minute in all.
See experiments/questions/reuse/README.md.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 100
    c.policy.path = "assets/reuse"
    c.data.kind = "jsonl"
    c.data.path = "assets/reuse/train.jsonl"
    c.data.size = 2048
    c.data.verifier = "last_number"
    c.data.max_prompt_len = 11
    c.rollout.prompts = 16
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 12
    # Eight spellings share the mass of a state, so that few tokens have 0.2 to lose: at 0.2 hardly anything is masked.
    for name in ("dppo_binary_tv", "dppo_binary_tv_proximal"):
        c.loss_defaults[name].update(delta_low=0.05, delta_high=0.05)
    c.train.epochs = 4  # 16 updates a step: the last one's data is 15 updates old
    c.train.minibatches = 4
    c.train.micro_rows = 32  # a whole minibatch at a time
    c.optimizer.learning_rate = 3e-4
    c.eval.sets.held_out = base.data_section(**{**c.data.to_dict(), "path": "assets/reuse/held_out.jsonl", "size": 512})
    c.eval.every = 50
    c.eval.prompts = 512
    c.eval.temperature = 1.0
    c.eval.top_p = 1.0
    return c
