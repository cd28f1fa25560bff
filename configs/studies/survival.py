"""The reuse regime as the survival map runs it: 40 steps, no evaluation. See experiments/questions/survival/README.md.

python -m experiments.questions.survival --config configs/studies/survival.py --workdir runs/survival
"""

from configs import reuse


def get_config():
    c = reuse.get_config()
    c.steps = 40  # where a run collapses, it has by then
    c.eval.every = 0
    c.checkpoint.every = 15
    c.policy.remat = "none"
    for name in ("binary_tv_unsigned", "pdm_topk_tv", "dppo_topk_tv"):  # as reuse sets its signed ones
        c.loss_defaults[name].update(delta_low=0.05, delta_high=0.05)
    return c
