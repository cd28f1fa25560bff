"""The reuse regime with a long tail: 256 spellings of every state, the k-th as frequent as 1/k; 3,355 tokens.

python -m experiments.reuse.make_model --out models/reuse_tail --spellings 256 --tail 1
python -m experiments.train --config configs/reuse_tail.py --workdir runs/reuse_tail
"""

from configs import base, reuse


def get_config():
    c = reuse.get_config()
    c.policy.path = "models/reuse_tail"
    c.data.path = "models/reuse_tail/train.jsonl"
    c.eval.sets.held_out = base.data_section(
        **{**c.data.to_dict(), "path": "models/reuse_tail/held_out.jsonl", "size": 512}
    )
    return c
