"""The paper's Dense Base run (2602.04879, section 7 and appendix E): Qwen3-8B-Base, responses of 8,000 tokens.

    python -m experiments.train --config configs/paper/dense_base.py --workdir runs/dense_base --distributed
    ... --config.loss.name=clip_higher, or any other row of LOSSES, for the paper's comparison

The mesh is for v5p:4x4x4: 7.6 GiB a chip in training, 23.9 in the rollout, of 95.7. 300 steps, every response as long
as it may be, take 9 hours without evaluation. For v6e:8x8 too: as much memory, of 31.3; 12 hours. With responses of
2,000 tokens on average (lognormal, deviation 1), --config.rollout.slots=256 and --config.rollout.in_flight=1: 2.6 hours
on v5p:4x4x4. Estimates of experiments.compile_for_tpu; real systems took 1.1 to 2.4 times as long (docs/pods.md).
Needs the model at policy.path, and JSON lines of {prompt, answer} at data.path and in eval.sets; without them, --trace
checks the config, and experiments.compile_for_tpu compiles it. Not run at this scale by us.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.policy.path = "models/Qwen3-8B-Base"
    c.policy.shape = "configs/paper/qwen3_8b_base.json"  # typed by hand; policy.path wins
    c.policy.dtype = "bfloat16"
    c.policy.remat = "full"
    c.policy.matmul = "default"
    c.data.kind = "jsonl"
    c.data.path = "data/dense_base.jsonl"
    c.data.size = 100_000
    c.data.verifier = "math_verify"
    c.data.max_prompt_len = 1024
    c.data.too_long = "skip"
    c.rollout.prompts = 128
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 8000
    c.rollout.dtype = "bfloat16"
    c.train.minibatches = 4  # of 32 prompts
    c.train.micro_rows = 4  # ours
    c.steps = 300  # ours
    c.eval.every = 10
    c.eval.sets.aime24 = base.data_section(
        kind="jsonl", path="data/aime24.jsonl", size=30, verifier="math_verify", max_prompt_len=1024
    )
    c.eval.samples = 32
    c.checkpoint.every = 10  # ours
    c.mesh.fsdp = 16
    c.mesh.tensor = 4
    return c
