"""Our side: `python -m experiments.benchmark.ours`. The functions that experiments.train compiles, from a config."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from experiments.benchmark import worker, workloads
from experiments.benchmark.workloads import WORKLOADS, Workload

LIBRARIES = {"jax": "jax", "experiments.run.setup": "dppo_jax"}
SLOTS = 48  # rollout.slots of workload L
IN_FLIGHT_SLOTS = 64  # where no slot waits for the longest response, more of them pay
TOPK = 20
SHADOW_LOSSES = (
    "ppo_clip", "clip_higher", "dual_clip", "gspo", "dppo_binary_tv", "dppo_binary_kl", "minimal_mask", "kpop",
    "trm_mean", "cppo",
)  # fmt: skip


def config_of(workload: Workload, **changes: Any):
    """The config of one training step of a workload; `changes` are values by dotted name, dots written as __."""
    from configs import base

    c = base.get_config()
    c.rollout.prompts, c.rollout.group_size = workload.prompts, workload.group_size
    c.rollout.max_new_tokens, c.data.max_prompt_len = workload.max_new_tokens, workload.prompt_length
    c.rollout.slots = SLOTS if workload.long_tail else 0
    c.train.minibatches = 4 if workload.long_tail else 1
    c.loss.name = "ppo_clip"
    c.policy.dtype = c.rollout.dtype = workload.dtype
    for name, value in changes.items():
        section, key = name.split("__")
        c[section][key] = value
    return c


class Experiment:
    """What a run needs of a workload's config: model, parameters, batch, and compiled functions made on demand."""

    def __init__(self, workload: Workload, **changes: Any):
        import contextlib

        import jax
        import numpy as np

        from dppo_jax.models.config import config_from_hf
        from dppo_jax.models.decoder import abstract_params
        from dppo_jax.types import PromptBatch
        from experiments.run.load import enter_mesh
        from experiments.run.setup import Setup, Text

        self.workload, self.config = workload, config_of(workload, **changes)
        self.model = config_from_hf(workloads.hf_config(workload), "the benchmark's")
        self._stack = contextlib.ExitStack()  # never closed: the mesh stays in force while the process lives
        mesh = enter_mesh(self.config, self._stack)
        self.setup = Setup(self.config, self.model, mesh, Text(None, (-1,), 0), workload.prompt_length)
        # Random weights in NumPy, as those of a model directory are.
        draw = np.random.default_rng(workload.seed).standard_normal
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                np.ones(leaf.shape, np.float32)
                if path[-1].key.endswith("norm")
                else 0.02 * draw(leaf.shape, dtype=np.float32)
            ),
            abstract_params(self.model),
        )
        lengths = workloads.lengths(workload)
        self.prompts = PromptBatch(
            tokens=workloads.prompt_tokens(workload),
            mask=np.ones((workload.prompts, workload.prompt_length), bool),
            group=np.arange(workload.prompts, dtype=np.int32),
            limit=lengths.reshape(workload.prompts, -1) if workload.long_tail else None,
        )

    @functools.cached_property
    def generate(self):
        from experiments.run.rollouts import training_rollout

        return self.setup.on_mesh(training_rollout(self.setup))

    @functools.cached_property
    def update(self):
        from dppo_jax.train_step import jit_update

        return jit_update(self.setup.update, self.setup.shardings, self.setup.mesh)

    def state(self):
        return self.setup.init_state(self.params)

    def plans(self, response_lengths):
        import numpy as np

        from dppo_jax import packing

        prompt_lengths = np.full(self.workload.rows, self.workload.prompt_length)
        return [
            packing.plan(index, prompt_lengths, response_lengths, self.setup.pack_shape, packed=self.config.train.pack)
            for index in self.setup.minibatches(0)
        ]


def rollout(workload: Workload, **changes: Any) -> worker.Run:
    """Every response drawn, with its log-probabilities."""
    import jax

    experiment = Experiment(workload, **changes)
    key, params = jax.random.key(workload.seed), jax.device_put(experiment.params)

    def run() -> worker.Json:
        mask = jax.block_until_ready(experiment.generate(params, experiment.prompts, key)).response_mask
        return {"tokens": int(mask.sum())}

    return run


def rollout_in_flight(workload: Workload, **changes: Any) -> worker.Run:
    """One step's responses, while those of the next step's prompts are under way in the other slots. Every step has
    lengths of its own, as many tokens as the workload's, and goes on from the one before."""
    import dataclasses
    import itertools

    import jax

    from experiments.run import rollouts

    experiment = Experiment(workload, rollout__in_flight=1, rollout__slots=IN_FLIGHT_SLOTS, **changes)
    setup = experiment.setup
    in_flight = rollouts.rollout_in_flight(setup, rollouts.training_rollout(setup))
    draw, join = jax.jit(in_flight, donate_argnums=1), jax.jit(in_flight.join, donate_argnums=0)
    key, params = jax.random.key(workload.seed), jax.device_put(experiment.params)
    steps, flights = itertools.count(), [in_flight.empty(workload.prompt_length)]

    def with_prompts(flight, number: int):
        limit = workloads.lengths(dataclasses.replace(workload, seed=number)).reshape(workload.prompts, -1)
        return join(flight, dataclasses.replace(experiment.prompts, limit=limit), number)

    def run() -> worker.Json:
        step, flight = next(steps), flights.pop()
        flight = with_prompts(flight if step else with_prompts(flight, 0), step + 1)
        flight, finished = jax.block_until_ready(draw(params, flight, key, step))
        flights.append(flight)
        return {"tokens": int(finished.rollout.response_mask.sum())}

    return run


def train(workload: Workload, **changes: Any) -> worker.Run:
    """Every minibatch of fixed responses: forward, backward, clip, AdamW. `occupancy` is that of its positions."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dppo_jax import packing
    from dppo_jax.types import TrainBatch

    experiment = Experiment(workload, **changes)
    lengths, tokens = workloads.lengths(workload), workloads.response_tokens(workload)
    mask = np.arange(workload.max_new_tokens) < lengths[:, None]
    rows = workloads.prompt_rows(workload)
    numbers = np.random.default_rng(workload.seed)
    ids = numbers.integers(0, workload.vocab_size, (*tokens.shape, TOPK)).astype(np.int32)
    topk = experiment.config.loss.name.startswith("dppo_topk")
    batch = TrainBatch(
        prompt_tokens=rows,
        prompt_mask=np.ones(rows.shape, bool),
        tokens=tokens,
        mask=mask,
        behavior_logp=np.where(mask, -math.log(workload.vocab_size), 0.0).astype(np.float32),
        advantages=workloads.advantages(workload),
        topk_ids=ids if topk else None,
        topk_behavior_logp=np.full(ids.shape, -math.log(workload.vocab_size), np.float32) if topk else None,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    plans = experiment.plans(lengths)
    states = [experiment.state()]

    def run() -> worker.Json:
        state = states.pop()
        for plan in plans:
            state, metrics = experiment.update(state, batch, plan)
        states.append(state)
        jax.block_until_ready((state, metrics))
        positions = int(sum(plan.num_microbatches for plan in plans)) * math.prod(experiment.setup.pack_shape[:2])
        return {"tokens": workload.train_tokens, "positions": positions, "occupancy": packing.occupancy(*plans)}

    return run


def step(workload: Workload, **changes: Any) -> worker.Run:
    """A rollout, then the update on what it drew."""
    import jax
    import jax.numpy as jnp

    from dppo_jax.train_step import assemble

    experiment = Experiment(workload, **changes)
    key, advantages = jax.random.key(workload.seed), jnp.asarray(workloads.advantages(workload))
    assembled = jax.jit(lambda *drawn: dataclasses.replace(assemble(*drawn), advantages=advantages))
    states = [experiment.state()]

    def run() -> worker.Json:
        state = states.pop()
        drawn = experiment.generate(state.params, experiment.prompts, key)
        batch = assembled(experiment.prompts, drawn)
        lengths = jax.device_get(drawn.response_mask).sum(axis=1)
        for plan in experiment.plans(lengths):
            state, metrics = experiment.update(state, batch, plan)
        states.append(state)
        jax.block_until_ready((state, metrics))
        return {"tokens": int(lengths.sum())}

    return run


def forward_backward(workload: Workload, micro_rows: int = 4) -> worker.Run:
    """Cross-entropy on every token and its gradients, added over microbatches of `micro_rows` rows; no optimizer."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dppo_jax.teacher_forced import make_policy_logprobs
    from dppo_jax.types import PackedBatch

    experiment = Experiment(workload)
    params = jax.device_put(experiment.params)
    tokens, length = workloads.train_tokens(workload), workload.train_length
    count = workload.rows // micro_rows
    remat = experiment.config.policy.remat
    policy_logprobs = make_policy_logprobs(experiment.model, temperature=1.0, dtype=jnp.float32, remat=remat)

    def cut(x):
        return jnp.asarray(x).reshape(count, micro_rows, length)

    zeros: np.ndarray = np.zeros((workload.rows, length), np.float32)
    columns = np.broadcast_to(np.arange(length), zeros.shape)
    batch = PackedBatch(
        tokens=cut(tokens[:, :-1]),
        segments=cut(np.ones(zeros.shape, np.int32)),
        positions=cut(columns.astype(np.int32)),
        columns=cut(columns.astype(np.int32) + 1),
        targets=cut(tokens[:, 1:]),
        mask=cut(zeros == 0),
        weights=cut(zeros + 1 / zeros.size),
        behavior_logp=cut(zeros),
        advantages=cut(zeros),
    )

    def loss(params, microbatch):
        return -jnp.sum(policy_logprobs(params, microbatch).logp * microbatch.weights)

    @jax.jit
    def gradient(params, batch):
        def add(number, total):
            microbatch = jax.tree.map(lambda x: x[number], batch)
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, microbatch))

        return jax.lax.fori_loop(0, count, add, (0.0, jax.tree.map(jnp.zeros_like, params)))

    def run() -> worker.Json:
        jax.block_until_ready(gradient(params, batch))
        return {"tokens": workload.train_tokens}

    return run


def head_memory(full: bool, vocabulary: int = 151_936, tokens: int = 2048, width: int = 1024) -> worker.Run:
    """Temporary memory of logp, its gradients and the entropy; compiled, not run."""
    import jax
    import jax.numpy as jnp

    from dppo_jax.token_head import token_head

    shapes = (
        jax.ShapeDtypeStruct((1, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )

    def ours(hidden, weight, targets):
        out = token_head(hidden, weight, targets)
        return jnp.sum(out.logp), jax.lax.stop_gradient(out.entropy)

    def plain(hidden, weight, targets):
        log_p = jax.nn.log_softmax(hidden @ weight.T)
        logp = jnp.take_along_axis(log_p, targets[..., None], axis=-1)
        return jnp.sum(logp), jax.lax.stop_gradient(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1))

    def run() -> worker.Json:
        gradient = jax.grad(plain if full else ours, argnums=(0, 1), has_aux=True)
        memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
        return {"tokens": tokens, "bytes": memory.temp_size_in_bytes, "logits_bytes": 4 * tokens * vocabulary}

    return run


def seconds(f: Callable[..., Any], *arguments: Any) -> float:
    """What one call takes, the best of five after one that compiles."""
    import time

    import jax

    jax.block_until_ready(f(*arguments))
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        durations.append(time.perf_counter() - start)
    return min(durations)


def machine() -> worker.Run:
    """The rates of this machine: products of square matrices, and reading an array; larger ones on an accelerator."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    a, big = jnp.ones((size, size), dtype), jnp.ones(2**26 if on_cpu else 2**30)
    product, read = jax.jit(lambda a: a @ a), jax.jit(lambda x: jnp.max(x.reshape(64, -1), axis=1))

    def run() -> worker.Json:
        return {
            "tokens": 0,
            "platform": jax.default_backend(),
            "dtype": jnp.dtype(dtype).name,
            "flops_per_second": 2 * size**3 / seconds(product, a),
            "bytes_per_second": big.nbytes / seconds(read, big),
        }

    return run


def _on(name: str, setup, **changes: Any):
    return lambda: setup(WORKLOADS[name], **changes)


TABLE: worker.Table = {
    ("S", "rollout"): _on("S", rollout),
    ("S", "train"): _on("S", train),
    ("S", "step"): _on("S", step),
    ("S", "train dppo_binary_tv"): _on("S", train, loss__name="dppo_binary_tv"),
    ("S", "train dppo_topk_tv"): _on("S", train, loss__name="dppo_topk_tv"),
    ("S", "train ten regions"): _on("S", train, log__regions=SHADOW_LOSSES),
    ("L", "rollout"): _on("L", rollout),
    ("L", "rollout in flight"): _on("L", rollout_in_flight),
    ("L", "static rollout"): _on("L", rollout, rollout__slots=0),
    ("L", "train"): _on("L", train),
    ("L", "unpacked train"): _on("L", train, train__pack=False),
    ("M", "rollout"): _on("M", rollout),
    ("M1", "rollout"): _on("M1", rollout),
    ("M", "train"): _on("M", forward_backward),
    ("G", "rollout"): _on("G", rollout),
    ("G", "train"): _on("G", train, policy__remat="full", train__micro_rows=8),
    ("head", "memory"): lambda: head_memory(full=False),
    ("head", "full memory"): lambda: head_memory(full=True),
    ("machine", "rates"): machine,
}


if __name__ == "__main__":
    worker.serve(TABLE, LIBRARIES, uses_jax=True)
