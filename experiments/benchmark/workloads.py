"""The fixed workloads and their data, the same on every side. NumPy only: peers import it in their own environments."""

from dataclasses import dataclass
from typing import Any

import numpy as np

_PROMPTS, _LENGTHS, _RESPONSES, _REWARDS, _TRAIN = range(5)  # one stream of random numbers for each purpose


@dataclass(frozen=True)
class Workload:
    """A model's shape and the work to do with it; the names are those of `ModelConfig`. Embeddings are tied.

    B = prompts * group_size rows; the end-of-sequence token is off: a response ends at its own length.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    prompts: int
    group_size: int
    prompt_length: int
    max_new_tokens: int
    train_length: int  # positions of a row in a train step
    long_tail: bool = False  # lengths from a log-normal; every response has max_new_tokens otherwise
    dtype: str = "float32"
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def train_tokens(self) -> int:
        """Positions of a train step, prompts included."""
        return self.rows * self.train_length


_SMALL: dict[str, Any] = {
    "model_type": "qwen3", "num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
    "intermediate_size": 768, "vocab_size": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
_SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "num_layers": 30, "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
    "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 1e5, "rms_norm_eps": 1e-5,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "num_layers": 28, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128,
    "intermediate_size": 6144, "vocab_size": 151_936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
}  # fmt: skip

WORKLOADS = {
    "S": Workload("S", **_SMALL, prompts=8, group_size=4, prompt_length=16, max_new_tokens=64, train_length=80),
    "M": Workload("M", **_SMOLLM2, prompts=4, group_size=8, prompt_length=50, max_new_tokens=64, train_length=128),
    # The same without groups: no two rows share a prompt.
    "M1": Workload("M1", **_SMOLLM2, prompts=32, group_size=1, prompt_length=50, max_new_tokens=64, train_length=128),
    "L": Workload(
        "L", **_SMALL, prompts=64, group_size=8, prompt_length=16, max_new_tokens=256, train_length=272, long_tail=True
    ),
    # For an accelerator: Qwen3-1.7B with random weights.
    "G": Workload("G", **_QWEN3, prompts=16, group_size=8, prompt_length=256, max_new_tokens=768, train_length=1024),
}


def hf_config(workload: Workload) -> dict[str, Any]:
    """The model's config.json."""
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[workload.model_type]
    return {
        "architectures": [architecture],
        "model_type": workload.model_type,
        "num_hidden_layers": workload.num_layers,
        "hidden_size": workload.hidden_size,
        "num_attention_heads": workload.num_heads,
        "num_key_value_heads": workload.num_kv_heads,
        "head_dim": workload.head_dim,
        "intermediate_size": workload.intermediate_size,
        "vocab_size": workload.vocab_size,
        "rope_theta": workload.rope_theta,
        "rms_norm_eps": workload.rms_norm_eps,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


def prompt_tokens(workload: Workload) -> np.ndarray:
    """The prompts, int32[prompts, prompt_length]; token 0 is never used, so it can be the pad."""
    return _tokens(workload, _PROMPTS, (workload.prompts, workload.prompt_length))


def prompt_rows(workload: Workload) -> np.ndarray:
    """Each prompt group_size times in a row, int32[B, prompt_length]."""
    return np.repeat(prompt_tokens(workload), workload.group_size, axis=0)


def response_tokens(workload: Workload) -> np.ndarray:
    """Responses to train on, int32[B, max_new_tokens]; row i has lengths(workload)[i] tokens, the rest is 0."""
    tokens = _tokens(workload, _RESPONSES, (workload.rows, workload.max_new_tokens))
    return np.where(np.arange(workload.max_new_tokens) < lengths(workload)[:, None], tokens, 0).astype(np.int32)


def train_tokens(workload: Workload) -> np.ndarray:
    """Plain text to train on, int32[B, train_length + 1]: inputs are [:, :-1], targets are [:, 1:]."""
    return _tokens(workload, _TRAIN, (workload.rows, workload.train_length + 1))


def lengths(workload: Workload) -> np.ndarray:
    """Tokens in each response, int32[B].

    With a long tail, round(exp(mu + z)), z standard normal, clipped to [1, max_new_tokens]; mu is such that the
    mean after clipping is a quarter of the maximum.
    """
    longest = workload.max_new_tokens
    if not workload.long_tail:
        return np.full(workload.rows, longest, np.int32)
    z = _generator(workload, _LENGTHS).standard_normal(workload.rows)

    def clipped(mu: float) -> np.ndarray:
        return np.clip(np.rint(np.exp(mu + z)), 1, longest)

    low, high = 0.0, float(np.log(longest))
    for _ in range(50):  # bisection: the mean grows with mu
        middle = (low + high) / 2
        low, high = (middle, high) if clipped(middle).mean() < longest / 4 else (low, middle)
    return clipped(high).astype(np.int32)


def rewards(workload: Workload) -> np.ndarray:
    """What the responses are worth, whatever they say, float32[B]."""
    return _generator(workload, _REWARDS).standard_normal(workload.rows).astype(np.float32)


def advantages(workload: Workload) -> np.ndarray:
    """Rewards less the mean of their group, float32[B]."""
    grouped = rewards(workload).reshape(workload.prompts, workload.group_size)
    if workload.group_size == 1:
        return grouped.reshape(-1)
    return (grouped - grouped.mean(1, keepdims=True)).reshape(-1)


def _generator(workload: Workload, purpose: int) -> np.random.Generator:
    return np.random.default_rng([workload.seed, purpose])


def _tokens(workload: Workload, purpose: int, shape: tuple[int, int]) -> np.ndarray:
    return _generator(workload, purpose).integers(1, workload.vocab_size, shape, dtype=np.int32)
