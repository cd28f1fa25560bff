"""How little can be masked? Falling tokens with A < 0 only, at three thresholds (2602.04879, Figure 5).

python -m experiments.questions.minimal_mask --config configs/reuse.py --workdir runs/study \
    --out experiments/questions/minimal_mask/result/reuse
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

ARMS = [
    Arm("dppo_binary_tv"),
    *(Arm("minimal_mask", numbers=(("delta_low", delta),)) for delta in (0.1, 0.5, 0.8)),
    Arm("pg_is"),
]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
