"""Do ratios hold back unlikely tokens? Clip-Higher, its bounds lifted where μ < α (2602.04879, Figures 6 and 7).

python -m experiments.questions.low_probability --config configs/reuse.py --workdir runs/study \
    --out experiments/questions/low_probability/result/reuse
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

ALPHA = (("alpha", 0.1),)
ARMS = [
    Arm("clip_higher"),
    Arm("relax_low", numbers=ALPHA),
    Arm("relax_high", numbers=ALPHA),
    Arm("relax_both", numbers=ALPHA),
    Arm("dppo_binary_tv"),
]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
