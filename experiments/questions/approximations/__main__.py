"""Does the estimate matter? Masks on the binary, the top-K and the exact divergence (2602.04879, Figure 11).

python -m experiments.questions.approximations --config configs/reuse.py --workdir runs/study \
    --out experiments/questions/approximations/result/reuse
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

ARMS = [Arm(f"dppo_{estimate}_{kind}") for kind in ("tv", "kl") for estimate in ("exact", "topk", "binary")]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
