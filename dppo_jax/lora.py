"""LoRA (2106.09685): the policy's weights stay as they are, and a product of two thin matrices beside each is trained.

The adapter of a weight W [..., I, O] is A [..., I, r] and B [..., r, O], under `<name>_lora_a` and `<name>_lora_b`
beside W, as qwix names them; `Layer` says where they enter. Rollouts, exact divergences and exports take merged
weights, W + (alpha / r) A B.
"""

from dppo_jax.models.adapters import ADAPTER, add_adapter
from dppo_jax.models.decoder import LOG_SIGMA, Params


def split(params: Params) -> tuple[Params, Params]:
    """What LoRA trains of a tree of parameters (or of their axes, or shapes), and what it leaves alone."""
    layers = params["layers"]
    adapters = {name: value for name, value in layers.items() if name.endswith(ADAPTER)}
    trained = {LOG_SIGMA: params[LOG_SIGMA]} if LOG_SIGMA in params else {}
    frozen = {name: value for name, value in params.items() if name != LOG_SIGMA}
    return {**trained, "layers": adapters}, {**frozen, "layers": {k: v for k, v in layers.items() if k not in adapters}}


def joined(frozen: Params, trained: Params) -> Params:
    """The inverse of `split`; `trained` itself where nothing is frozen."""
    if not frozen:
        return trained
    return {**frozen, **trained, "layers": {**frozen["layers"], **trained["layers"]}}


def merged(params: Params, scale: float) -> Params:
    """Parameters without adapters that compute the same: W + scale A B for every W that has one."""
    a, b = ADAPTER
    layers = params["layers"]

    def without_adapter(name: str):
        if name + a not in layers:
            return layers[name]
        return add_adapter(layers[name], layers[name + a], layers[name + b], scale)

    return {**params, "layers": {name: without_adapter(name) for name in layers if not name.endswith(ADAPTER)}}
