"""Is a trust region needed? Losses with none, with one around a recomputed anchor, and DPPO (2602.04879, Figure 3).

python -m experiments.questions.necessity --config configs/reuse.py --workdir runs/study --out DIR/F
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

ARMS = [
    Arm("dppo_binary_tv"),
    Arm("dppo_binary_kl"),
    Arm("clip_higher"),
    Arm("minirl"),
    Arm("minirl_tis"),
    Arm("cispo"),
    Arm("pg_is"),
]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
