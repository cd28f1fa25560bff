"""Sets of reasoning-gym that the paper has beside mathematics (2602.04879, appendix F.5), asked once or again.

    python -m experiments.train --config configs/reasoning_gym.py:acre --workdir runs/acre
    python -m experiments.train --config configs/reasoning_gym.py:acre_turns --workdir runs/acre_turns

NAME asks every question once. NAME_turns tells the policy that its answer is wrong, and asks again, up to four times.
The model is another one's to choose: it needs a chat template for the turns. Lengths are ours. Not run by us.
"""

from configs import base

PROMPT_TOKENS = {"mini_sudoku": 256, "arc_1d": 1024, "acre": 1024}
TURNS = "_turns"
ARGUMENTS = tuple(name + suffix for name in PROMPT_TOKENS for suffix in ("", TURNS))


def get_config(argument: str = "mini_sudoku"):
    c = base.get_config()
    name = argument.removesuffix(TURNS)
    c.policy.path = "models/Qwen3-1.7B-Base"
    c.policy.shape = "configs/paper/qwen3_1_7b_base.json"  # typed by hand; policy.path wins
    c.policy.dtype = "bfloat16"
    c.policy.remat = "full"
    c.policy.matmul = "default"
    c.data.name = name
    c.data.chat = True
    c.data.max_prompt_len = PROMPT_TOKENS[name]
    c.data.too_long = "skip"
    c.rollout.prompts = 64
    c.rollout.max_new_tokens = 2048
    c.rollout.dtype = "bfloat16"
    if argument.endswith(TURNS):
        c.data.kind = "environment"
        c.data.max_turns = 4
        c.rollout.turn_tokens = 1024
        c.rollout.max_new_tokens = 4096
    return c
