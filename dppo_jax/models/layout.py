"""What a parameter of ours is made of in a model directory: one tensor, or one of every layer (and expert)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dppo_jax.models.decoder import Params

LAYERS = "layers/"  # what the paths of stacked parameters begin with


class Leaf(NamedTuple):
    """A parameter of ours by the tensors that it is made of there. Tensors may be theirs transposed."""

    path: str  # "embed", "layers/q"
    shape: tuple[int, ...]  # ours
    template: str  # the tensors' name, {} for each of the leading axes
    transposed: bool  # a linear layer's weight: [out, in] there and [in, out] here

    @property
    def leading(self) -> int:
        """How many of the first axes are tensors of their own there."""
        return self.template.count("{}")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of one tensor, as it is there."""
        shape = self.shape[self.leading :]
        return shape[::-1] if self.transposed else shape

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Of the tensors, in the order of the leading axes."""
        return leading_indices(self.shape[: self.leading])

    def name(self, index: Sequence[int]) -> str:
        """Of one tensor."""
        return self.template.format(*index)


def leading_indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices of axes of these sizes, one by one: a config may claim any number of them."""
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in leading_indices(sizes[1:]):
            yield first, *rest


def flat(params: Params) -> dict[str, Any]:
    """Leaves by path: "embed", "layers/q"."""
    leaves = {name: value for name, value in params.items() if name != "layers"}
    return leaves | {LAYERS + name: value for name, value in params.get("layers", {}).items()}


def nested(leaves: dict[str, Any]) -> Params:
    """The inverse of `flat`."""
    params: Params = {"layers": {}}
    for path, value in leaves.items():
        within = params["layers"] if path.startswith(LAYERS) else params
        within[path.removeprefix(LAYERS)] = value
    return params
