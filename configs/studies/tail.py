"""Studies in the reuse regime with a long tail: 256 spellings of a state, the k-th as frequent as 1/k; 3,355 tokens.

python -m experiments.questions.reuse.make_model --out models/reuse_tail --spellings 256 --tail 1
python -m experiments.questions.necessity --config configs/studies/tail.py --workdir DIR --seeds 6 --out DIR/F
"""

from configs.studies import reuse


def get_config():
    c = reuse.get_config()
    c.steps = 60
    c.policy.path = "models/reuse_tail"
    c.data.path = "models/reuse_tail/train.jsonl"
    return c
