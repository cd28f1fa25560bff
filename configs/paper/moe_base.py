"""The paper's MoE Base run (2602.04879, section 7 and appendix E, table 1): Qwen3-30B-A3B-Base, responses of 16,384.

    python -m experiments.train --config configs/paper/moe_base.py --workdir runs/moe_base --distributed
    ... --config.loss.name=clip_higher, or any other row of LOSSES, for the paper's comparison

The mesh is for v5p:4x4x4: 18.3 GiB a chip in training, 67.5 in the rollout, of 95.7. 300 steps, every response as long
as it may be, take 98 hours without evaluation. For v6e:8x8, with --config.mesh.fsdp=8 --config.mesh.expert=8
--config.rollout.slots=512: 20.6 and 22.4, of 31.3; 163 hours. With responses of 3,700 tokens on average (lognormal,
deviation 1), --config.rollout.slots=512 and --config.rollout.in_flight=1: 27 hours on v5p:4x4x4. Estimates of
experiments.compile_for_tpu; real systems took 1.1 to 2.4 times as long (docs/pods.md).
Needs the model at policy.path, and JSON lines of {prompt, answer} at data.path and in eval.sets; without them, --trace
checks the config, and experiments.compile_for_tpu compiles it. Not run at this scale by us.
"""

from configs.paper import dense_base


def get_config():
    c = dense_base.get_config()
    c.policy.path = "models/Qwen3-30B-A3B-Base"
    c.policy.shape = "configs/paper/qwen3_30b_a3b_base.json"  # typed by hand; policy.path wins
    c.data.path = "data/moe_base.jsonl"
    c.rollout.prompts = 256
    c.rollout.group_size = 16
    c.rollout.max_new_tokens = 16384
    c.rollout.slots = 2048  # ours
    c.train.minibatches = 8  # of 32 prompts
    c.train.micro_rows = 1  # ours
    c.eval.every = 5
    c.eval.prompts = 64  # the mesh divides it
    c.checkpoint.every = 5  # ours
    c.mesh.fsdp = 16
    c.mesh.tensor = 1
    c.mesh.expert = 4
    return c
