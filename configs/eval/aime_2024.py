"""AIME 2024: 30 problems, 32 samples each.

    python -m experiments.eval --config configs/eval/aime_2024.py --policy ORG/NAME --results runs/aime_2024.parquet
"""

from configs.eval import benchmark


def get_config():
    return benchmark("aime_2024", samples=32, prompts=8, name="HuggingFaceH4/aime_2024")
