"""What crosses a boundary: frozen pytree dataclasses, with the shape and dtype of every field.

N = prompts, G = responses per prompt, B = N * G rows (row b answers prompt b // G), P = prompt length,
R = response length, K = top-K tokens (`rollout.tracked`). Prompts are padded on the left, responses on the right.

L = layers, X = experts of a mixture, k = experts per token. Lk = L * k: the experts of a token in all layers, where
column l * k + j is choice j of layer l.

A training pass sees M packed rows of T tokens, several samples (a prompt and its response) in each, and Q of each
row's columns as response tokens.
"""

from collections.abc import Callable

from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Integer

Rounding = Callable[[Array], Array]  # rounds to the values of a narrower format; shape and dtype stay


@struct.dataclass
class PromptBatch:
    """The prompts of one step; answers stay on the host."""

    tokens: Int32[Array, "N P"]
    mask: Bool[Array, "N P"]  # False on the padding, which is on the left
    group: Int32[Array, "N"]  # which group each prompt's responses form: 0 .. N-1
    limit: Int32[Array, "N G"] | None = None  # most tokens of each response, from 1 to R; None: R


@struct.dataclass
class RolloutBatch:
    """What the behavior policy drew, and how likely it was to draw it."""

    tokens: Int32[Array, "B R"]
    response_mask: Bool[Array, "B R"]  # the end-of-sequence token counts; what follows it does not
    behavior_logp: Float32[Array, "B R"]  # of the distribution drawn from, temperature included; 0 outside the mask
    truncated: Bool[Array, "B"]  # reached its limit without an end-of-sequence token
    group: Int32[Array, "B"]
    topk_ids: Int32[Array, "B R K"] | None = None  # the K likeliest tokens under the behavior policy
    topk_logp: Float32[Array, "B R K"] | None = None  # their behavior log-probabilities
    prompt_experts: Integer[Array, "N P Lk"] | None = None  # experts of each prompt token
    experts: Integer[Array, "B R Lk"] | None = None  # of each response token; 0 at the last, which is not decoded from
    own: Bool[Array, "B R"] | None = None  # which tokens of a conversation the policy drew; None: all of them
    behavior_entropy: Float32[Array, "B R"] | None = None  # of the distribution drawn from, in nats; None: not recorded


@struct.dataclass
class TrainBatch:
    """What a step trains on: every row of its rollout batch."""

    prompt_tokens: Int32[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    tokens: Int32[Array, "B R"]
    mask: Bool[Array, "B R"]
    behavior_logp: Float32[Array, "B R"]
    advantages: Float32[Array, "B"] | Float32[Array, "B R"]  # of a response, or of each of its tokens
    group: Int32[Array, "B"] | None = None
    topk_ids: Int32[Array, "B R K"] | None = None
    topk_behavior_logp: Float32[Array, "B R K"] | None = None
    proximal_logp: Float32[Array, "B R"] | None = None
    topk_proximal_logp: Float32[Array, "B R K"] | None = None
    reference_logp: Float32[Array, "B R"] | None = None
    teacher_logp: Float32[Array, "B R"] | None = None
    prompt_experts: Integer[Array, "B P Lk"] | None = None
    experts: Integer[Array, "B R Lk"] | None = None
    own: Bool[Array, "B R"] | None = None  # as of RolloutBatch; `mask` is within it
    behavior_entropy: Float32[Array, "B R"] | None = None  # as of RolloutBatch


@struct.dataclass
class PackedBatch:
    """Samples one after another in M rows, without padding between them. Made by `packing.pack`."""

    tokens: Int32[Array, "M T"]
    segments: Int32[Array, "M T"]  # the sample a token belongs to, from 1; 0: no token
    positions: Int32[Array, "M T"]  # from 0 in each sample
    columns: Int32[Array, "M Q"]  # where the response tokens stand
    targets: Int32[Array, "M Q"]  # the response tokens
    mask: Bool[Array, "M Q"]  # False beyond a row's response tokens, and at context; all fields below are 0 there
    weights: Float32[Array, "M Q"]  # aggregation weights
    behavior_logp: Float32[Array, "M Q"]
    advantages: Float32[Array, "M Q"]
    topk_ids: Int32[Array, "M Q K"] | None = None
    topk_behavior_logp: Float32[Array, "M Q K"] | None = None
    proximal_logp: Float32[Array, "M Q"] | None = None
    topk_proximal_logp: Float32[Array, "M Q K"] | None = None
    reference_logp: Float32[Array, "M Q"] | None = None
    teacher_logp: Float32[Array, "M Q"] | None = None
    experts: Integer[Array, "M T Lk"] | None = None  # the rollout's experts of each token, which this pass takes again
    behavior_entropy: Float32[Array, "M Q"] | None = None


@struct.dataclass
class TopKPair:
    """Two policies on the behavior policy's K likeliest tokens."""

    logp: Float32[Array, "M Q K"]
    behavior_logp: Float32[Array, "M Q K"]
    has_sampled: Bool[Array, "M Q"]  # whether the sampled token is among the K
    proximal_logp: Float32[Array, "M Q K"] | None = None
    outside: Int32[Array, "M Q"] | None = None  # tokens of the vocabulary beside the K and the sampled one


@struct.dataclass
class SlopeSums:
    """Sums over the tokens j beside the sampled one, of which the slopes of divergences are made.

    s_j is the sign of pi_j - mu_j. The slopes: `kl_slope` and `tv_slope` of dppo_jax/divergences.py.
    """

    gap: Float32[Array, "M Q"]  # pi_j (mu_j - pi_j)
    square: Float32[Array, "M Q"]  # pi_j^2
    signed: Float32[Array, "M Q"]  # s_j pi_j
    signed_square: Float32[Array, "M Q"]  # s_j pi_j^2


@struct.dataclass
class ExactDivergence:
    """Full-vocabulary divergences of the policy from the behavior policy."""

    tv: Float32[Array, "M Q"]
    kl: Float32[Array, "M Q"]
    slope: SlopeSums | None = None  # None unless a loss asks for it


@struct.dataclass
class LossInputs:
    """All that a policy loss may see. A loss that needs an optional field asks with `require`.

    A row of the M holds the tokens of several responses, each in its own columns of the Q: `segments` says which. Sums
    over a response are those of `losses.core.Sequences`, never sums over a row.
    """

    logp: Float32[Array, "M Q"]
    behavior_logp: Float32[Array, "M Q"]
    advantages: Float32[Array, "M Q"]
    mask: Bool[Array, "M Q"]
    segments: Int32[Array, "M Q"] | None = None  # the token's response, of those in its row; None: one a row
    proximal_logp: Float32[Array, "M Q"] | None = None
    reference_logp: Float32[Array, "M Q"] | None = None
    teacher_logp: Float32[Array, "M Q"] | None = None
    behavior_entropy: Float32[Array, "M Q"] | None = None  # in nats
    topk: TopKPair | None = None
    exact: ExactDivergence | None = None


@struct.dataclass
class LossOutput:
    """What a loss returns, per token and unreduced."""

    coef: Float32[Array, "M Q"]  # multiplies grad log pi; no gradient flows through it; 0 outside the mask
    keep: Bool[Array, "M Q"]  # inside the trust region; False outside the mask
    metrics: dict[str, tuple[Float32[Array, "M Q"], Bool[Array, "M Q"]]]  # name -> (value, where it counts)


@struct.dataclass
class Routing:
    """How the tokens of one pass spread over a mixture's X experts."""

    load: Float32[Array, "L X"]  # tokens that each expert took
    entropy: Float32[Array, "L"]  # of the router's softmax over all X, in nats, summed over tokens
    tokens: Float32[Array, ""]


@struct.dataclass
class HeadOutput:
    """The policy at each response position, from the token head."""

    logp: Float32[Array, "M Q"]  # of the target token
    entropy: Float32[Array, "M Q"]
    ids_logp: Float32[Array, "M Q K"] | None = None  # of the K token ids that were passed
    exact: ExactDivergence | None = None  # from the behavior policy; None unless its hidden states were passed
    routing: Routing | None = None  # of a mixture of experts
    vocabulary: Int32[Array, ""] | None = None  # V, how many tokens the distribution is over
