"""Labels that no verifier could accept: the first is refused, or all are left out. No jax here."""

from collections.abc import Sequence

from dppo_jax.data.examples import UNSCORED, Example
from dppo_jax.data.shapes import Reading
from dppo_jax.errors import UserError
from dppo_jax.rewards.labels import answer_faults, check_labels


def with_good_labels(
    name: str, found: Sequence[tuple[Example, str | None]], verifier: str, reading: Reading
) -> list[Example]:
    """Of examples and what is wrong with their rows' labels those that the verifier can accept.

    A data set's own scorer ("task") was asked before. `name` is the data's, for sentences, and examples say where they
    are. Raises: UserError for the first other one, unless data.bad_label is "drop"; then where none is left.
    """
    faults = {example.where: f"{example.where}: {fault}" for example, fault in found if fault}
    if faults and reading.bad_label == "error":
        raise UserError(next(iter(faults.values())))
    examples = [example for example, fault in found if not fault]
    for scorer in sorted({example.verifier or verifier for example in examples}):
        if scorer in (UNSCORED, "task"):
            continue
        of_scorer = [example for example in examples if (example.verifier or verifier) == scorer]
        labels = [(example.where, label) for example in of_scorer for label in example.labels]
        if reading.bad_label == "error":
            check_labels(scorer, labels, cache=reading.label_cache)
            continue
        found_faults = answer_faults(scorer, [label for _, label in labels], cache=reading.label_cache)
        for (where, label), fault in zip(labels, found_faults, strict=True):
            if fault:
                faults.setdefault(where, f"{where}: the answer {label!r:.200} {fault}")
    good = [example for example in examples if example.where not in faults]
    if not good:
        first = next(faults[example.where] for example, _ in found)
        raise UserError(f"{name}: all {len(found)} rows have bad labels, so nothing is left; {first}")
    return good
