"""Public benchmarks, one small file each: sampled at 0.6 (top-p 0.95) to 32,768 tokens, as reasoning models are.

    python -m experiments.eval --config configs/eval/aime_2024.py --policy MODEL --results FILE.parquet
"""

from ml_collections import ConfigDict

from configs import base

BOXED = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def benchmark(tag: str, *, samples: int, prompts: int, **data: str) -> ConfigDict:
    """A config with one evaluation set from the hub, `tag` in its tags. `prompts`: questions per batch, each of which
    is kept when it is done."""
    c = base.get_config()
    c.policy.matmul = "default"
    c.rollout.dtype = "bfloat16"
    c.eval.sets[tag] = base.data_section(
        kind="hub", verifier="math_verify", chat=True, template=BOXED, max_prompt_len=2048, **data
    )
    c.eval.samples = samples
    c.eval.prompts = prompts
    c.eval.max_new_tokens = 32_768 - 2048
    c.eval.temperature = 0.6
    c.eval.top_p = 0.95
    return c
