"""The reuse regime with its mismatch, for rows in flight: as many slots as one batch has rows.

python -m experiments.questions.age --config configs/studies/age.py --workdir DIR --seeds 6 --out DIR/F
"""

from configs.studies import reuse


def get_config():
    c = reuse.get_config()
    c.rollout.slots = 64  # of 128 rows: half of a batch is under way while another is finished
    return c
