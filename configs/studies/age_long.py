"""The same question with replies of 71 tokens: six pauses after every state.

python -m experiments.questions.reuse.make_model --out models/reuse_pauses --pauses 6
python -m experiments.questions.age --config configs/studies/age_long.py --workdir DIR --seeds 6 --out DIR/F
"""

from configs.studies import age


def get_config():
    c = age.get_config()
    c.steps = 50
    c.policy.path = "models/reuse_pauses"
    c.data.path = "models/reuse_pauses/train.jsonl"
    c.rollout.max_new_tokens = 72
    c.rollout.activations = ""  # with the mismatch the two losses tried fell
    c.optimizer.learning_rate = 1e-4  # what was tried beside it is in experiments/questions/age/README.md
    c.rollout.prompts = 8
    c.rollout.slots = 32  # of 64 rows
    c.train.micro_rows = 16  # a whole minibatch at a time
    return c
