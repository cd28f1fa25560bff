"""AMC 2023: 40 problems of AMC 12 with whole numbers for answers, 32 samples each.

    python -m experiments.eval --config configs/eval/amc.py --policy ORG/NAME --results runs/amc.parquet
"""

from configs.eval import benchmark


def get_config():
    return benchmark("amc", samples=32, prompts=8, name="math-ai/amc23", split="test")
