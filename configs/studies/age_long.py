"""The same question with replies of 64 states, so that most of them are drawn by several policies.

python -m experiments.questions.reuse.make_model --out models/reuse_long --steps 64
python -m experiments.questions.age --config configs/studies/age_long.py --workdir DIR --seeds 6 --out DIR/F
"""

from configs.studies import age


def get_config():
    c = age.get_config()
    c.steps = 40
    c.policy.path = "models/reuse_long"
    c.data.path = "models/reuse_long/train.jsonl"
    c.data.max_prompt_len = 65
    c.rollout.max_new_tokens = 66
    return c
