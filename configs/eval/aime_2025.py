"""AIME 2025: 30 problems, 32 samples each.

    python -m experiments.eval --config configs/eval/aime_2025.py --policy ORG/NAME --results runs/aime_2025.parquet
"""

from configs.eval import benchmark


def get_config():
    return benchmark("aime_2025", samples=32, prompts=8, name="math-ai/aime25", split="test")
