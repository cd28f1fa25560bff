"""Does a trust region matter more where tokens are older? Losses with rows in flight, up to 0, 1, 2 and 4 steps old.

python -m experiments.questions.age --config configs/studies/age.py --workdir runs/study --seeds 6 --out DIR/F
"""

from dppo_jax.errors import run_main
from experiments.study import Arm, main

LOSSES = ("pg_is", "cispo", "clip_higher", "minirl", "dppo_binary_tv", "dppo_topk_tv")
AGES = (0, 1, 2, 4)  # rollout.in_flight, and with it the age that a token may have

ARMS = [Arm(loss, settings=(("rollout.in_flight", age),) if age else ()) for loss in LOSSES for age in AGES]

if __name__ == "__main__":
    run_main(lambda: main(__doc__, ARMS))
