"""google-tunix's side. Run by a Python that has it, with PYTHONPATH at the repository's root:

PYTHON experiments/benchmark/peer_tunix.py

All of it is its own: RLCluster with the vanilla rollout, GRPOLearner's loss and advantages, its trainer.
Written for google-tunix 0.1.7.
"""

from collections.abc import Callable
from typing import Any

from experiments.benchmark import worker, workloads
from experiments.benchmark.workloads import WORKLOADS, Workload

LIBRARIES = {
    "tunix.rl.grpo.grpo_learner": "google-tunix",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
}


class NumberTokenizer:
    """Text is token ids in decimal. The special ids lie outside the vocabulary: nothing is padding, nothing ends."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # which the sampler takes for "none"

    def pad_id(self) -> int:
        return self._vocab_size

    def eos_id(self) -> int:
        return self._vocab_size + 1


def _learner(workload: Workload) -> Any:
    """A GRPOLearner on one device, with random weights.

    The settings, where there was a choice:
    - the model's defaults: no remat, no flash attention (which is for TPUs only);
    - the cache and the prompts have exactly the size they need (by default 1024 and 64 positions);
    - top_p = 1 and top_k None take the sampler's short path, a plain categorical draw; top_p None would be greedy;
    - one mesh for actor and rollout: they share the weights, and there is nothing to synchronise;
    - whole batches: no micro-batches, no gradient accumulation;
    - beta = 0, so no reference model, and one iteration a batch, so no recomputed log-probs;
    - log-probs are returned from the rollout, as on our side: off-policy losses need them.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    config = qwen3.ModelConfig(
        num_layers=workload.num_layers,
        vocab_size=workload.vocab_size,
        embed_dim=workload.hidden_size,
        hidden_dim=workload.intermediate_size,
        num_heads=workload.num_heads,
        head_dim=workload.head_dim,
        num_kv_heads=workload.num_kv_heads,
        rope_theta=int(workload.rope_theta),
        norm_eps=workload.rms_norm_eps,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(params=workload.seed))
    keys = iter(jax.random.split(jax.random.key(workload.seed), 3 * workload.num_layers))
    for layer in model.layers:  # these are zeros as they come
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.kernel[...] = 0.02 * jax.random.normal(next(keys), linear.kernel.shape)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=NumberTokenizer(workload.vocab_size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={rl_cluster.Role.ACTOR: mesh, rl_cluster.Role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)),
                eval_every_n_steps=1_000_000,
                rollout_micro_batch_size=workload.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=workload.max_new_tokens,
                max_prompt_length=workload.prompt_length,
                kv_cache_size=workload.prompt_length + workload.max_new_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                return_logprobs=True,
            ),
        ),
    )
    values = list(map(float, workloads.rewards(workload)))
    return grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=workload.group_size, num_iterations=1, beta=0.0, epsilon=0.2
        ),
        reward_fns=lambda prompts, completions, **_: values,
    )


def _prompts(workload: Workload) -> list[str]:
    """Each prompt as often as its group has members, as its learner repeats them."""
    return [" ".join(map(str, row)) for row in workloads.prompt_rows(workload)]


def _update(learner: Any, example: Any) -> None:
    """One step of its trainer on `example`; back when the parameters are there."""
    import jax
    from flax import nnx

    learner.rl_cluster.update_actor([example], None)
    jax.block_until_ready(nnx.state(learner.rl_cluster.actor_trainer.model))


def rollout(workload: Workload) -> worker.Run:
    """All rows in one call, each to max_new_tokens."""
    learner, prompts = _learner(workload), _prompts(workload)
    tokens = workload.rows * workload.max_new_tokens

    def run() -> worker.Json:
        output = learner.rl_cluster.generate(prompts)  # tokens and log-probs are on the host
        assert sum(map(len, output.tokens)) == sum(map(len, output.logprobs)) == tokens
        return {"tokens": tokens}

    return run


def long_rollout(workload: Workload, rows_per_call: int) -> worker.Run:
    """Rows of unequal lengths, `rows_per_call` at a time; a call lasts until its longest row is done.

    Its sampler has no limit for a single row, so the limit is that of the call: what the end-of-sequence token would
    have given, had the rows drawn it there. Only the real tokens are counted.
    """
    learner, prompts, lengths = _learner(workload), _prompts(workload), workloads.lengths(workload)
    calls = [slice(start, start + rows_per_call) for start in range(0, workload.rows, rows_per_call)]
    longest = [int(lengths[rows].max()) for rows in calls]

    def call(rows: slice, limit: int) -> None:
        output = learner.rl_cluster.generate(prompts[rows], max_generation_steps=limit)
        assert all(len(row) >= length for row, length in zip(output.tokens, lengths[rows], strict=True))

    def run() -> worker.Json:
        for rows, limit in zip(calls, longest, strict=True):
            call(rows, limit)
        return {"tokens": int(lengths.sum())}

    if len(calls) > 1:  # warm up on less than a run: every shape, twice, as a second call compiles a little too
        for limit in 2 * sorted(set(longest)):
            call(calls[longest.index(limit)], limit)

    return run


def train(workload: Workload) -> worker.Run:
    """One optimizer step on fixed prompts, responses and advantages: its GRPO loss, AdamW, global-norm clip."""
    import jax.numpy as jnp
    from tunix.rl import common

    learner = _learner(workload)
    prompts, responses = workloads.prompt_rows(workload), workloads.response_tokens(workload)
    example = common.TrainExample(
        prompt_ids=jnp.asarray(prompts),
        prompt_mask=jnp.ones(prompts.shape, bool),
        completion_ids=jnp.asarray(responses),
        completion_mask=jnp.ones(responses.shape, bool),
        advantages=jnp.asarray(workloads.advantages(workload)),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )

    def run() -> worker.Json:
        _update(learner, example)
        return {"tokens": workload.train_tokens}

    return run


def step(workload: Workload) -> worker.Run:
    """What its learner does in a global step, in the same order, without the threads and queues between."""
    learner, prompts = _learner(workload), _prompts(workload)
    assert not learner.should_sync_weights

    def run() -> worker.Json:
        example = learner._generate_and_compute_advantage({"prompts": prompts})
        _update(learner, example)
        learner.rl_cluster.global_steps += 1
        return {"tokens": workload.rows * workload.max_new_tokens}

    return run


def _on(name: str, setup: Callable[..., worker.Run], **settings: Any) -> Callable[[], worker.Run]:
    return lambda: setup(WORKLOADS[name], **settings)


TABLE: worker.Table = {
    ("S", "rollout"): _on("S", rollout),
    ("S", "train"): _on("S", train),
    ("S", "step"): _on("S", step),
    # As fast as each other on one core (68 s each); one call takes twice the memory (1.5 GB against 0.8 GB).
    ("L", "rollout"): _on("L", long_rollout, rows_per_call=64),
    ("L", "rollout_one_call"): _on("L", long_rollout, rows_per_call=512),
}


if __name__ == "__main__":
    worker.serve(TABLE, LIBRARIES, uses_jax=True)
