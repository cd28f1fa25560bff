"""The embedded tiny model learns to add from a reward model, which has learned what a verifier says.

    python -m experiments.build_sanity_set --config configs/quickstart.py --policy assets/tiny --samples 8 \
        --out runs/sanity.parquet
    python -m experiments.recipes.reward_model.make --replies runs/sanity.results.parquet --policy assets/tiny \
        --out runs/reward_model --epochs 8 --learning-rate 1e-3
    python -m experiments.train --config configs/reward_model.py --workdir runs/from_reward_model

experiments/recipes/reward_model/README.md says what came of it.
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.data.verifier = "none"  # the evaluation set keeps its own, and only measures
    c.reward.terms.correct = 0.0
    c.reward.terms.model = 1.0
    c.reward.model.path = "runs/reward_model"
    c.reward.model.max_len = 48
    c.reward.model.rows = 256
    return c
