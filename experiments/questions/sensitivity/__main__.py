"""How much does the threshold matter? DPPO's δ and Clip-Higher's ε, both scaled (2602.04879, Figure 19).

python -m experiments.questions.sensitivity --config configs/reuse.py --workdir runs/study \
    --out experiments/questions/sensitivity/result/reuse
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

ARMS = [Arm(loss, scale) for loss in ("dppo_binary_tv", "clip_higher") for scale in (1.0, 0.4, 2.0, 4.0)]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
