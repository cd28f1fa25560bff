"""Around which policy? DPPO anchored on the behavior policy and on the recomputed one (2602.04879, Figure 4).

python -m experiments.questions.anchor --config configs/reuse.py --workdir runs/study --out DIR/F
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

ARMS = [Arm("dppo_binary_tv"), Arm("dppo_binary_tv_proximal"), Arm("dppo_binary_kl"), Arm("dppo_binary_kl_proximal")]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
