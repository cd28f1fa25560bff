"""SmolLM2-135M-Instruct on short sums, as two CPU cores train it beside other work: 60 steps of 16 replies.

make smollm2
python -m experiments.questions.necessity --separate --config configs/studies/smollm2_cpu.py --seeds 1 \
    --arms dppo_binary_tv,clip_higher --workdir runs/smollm2_cpu --out runs/smollm2_cpu/necessity
"""

from configs.studies import smollm2_gpu


def get_config():
    c = smollm2_gpu.get_config()
    c.data.settings = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    c.data.chat = False  # the template's system message would be most of a row
    c.data.max_prompt_len = 32
    c.rollout.prompts = 4
    c.rollout.group_size = 4
    c.rollout.max_new_tokens = 16
    c.rollout.dtype = "float32"  # with what bfloat16 would round: its own products are slow here
    c.rollout.weights = c.rollout.activations = "bfloat16"
    c.train.minibatches = 4
    c.train.micro_rows = 2
    c.checkpoint.every = 10
    return c
