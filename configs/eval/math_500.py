"""MATH-500 (2305.20050): 500 problems of MATH, 4 samples each.

    python -m experiments.eval --config configs/eval/math_500.py --policy ORG/NAME --results runs/math_500.parquet
"""

from configs.eval import benchmark


def get_config():
    return benchmark("math_500", samples=4, prompts=64, name="HuggingFaceH4/MATH-500", split="test")
