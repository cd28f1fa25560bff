"""Evaluates a policy on a config's evaluation sets: avg@n, pass@k and maj@n.

python -m experiments.eval --config configs/quickstart.py --checkpoint runs/quickstart
python -m experiments.eval --config configs/eval/aime_2024.py --policy ORG/NAME --results runs/aime_2024.parquet
"""

import contextlib
import sys
from typing import Any

from ml_collections import ConfigDict

from dppo_jax.devices import peers
from dppo_jax.devices.hosts import is_writer
from dppo_jax.errors import UserError
from dppo_jax.files import Path
from experiments.run import cli, policy
from experiments.run.evaluation import Evaluation
from experiments.run.results import Results, about, begun
from experiments.run.runs import Runs


def evaluate(
    config: ConfigDict,
    checkpoint: Path | None = None,
    *,
    policy_name: str | None = None,
    results: Path | None = None,
) -> dict[str, float]:
    """{"eval/<set>/<metric>": value} of a run's newest checkpoint, one step's folder, or a Hugging Face directory; or
    of --policy. `results`: a file that keeps every sample, and goes on where it ended. UserError."""
    with contextlib.ExitStack() as stack:
        return evaluated(config, stack, checkpoint=checkpoint, policy_name=policy_name, results=results)[0]


def evaluated(
    config: ConfigDict,
    stack: contextlib.ExitStack,
    *,
    checkpoint: Path | None = None,
    policy_name: str | None = None,
    results: Path | None = None,
) -> tuple[dict[str, float], Evaluation, dict[str, Any]]:
    """The same, with the evaluation and, of a results file, what its samples are a function of."""
    if not config.eval.sets:
        raise UserError("the config has no evaluation set: eval.sets is empty")
    pin, before = results is not None, begun(results)
    loaded = policy.load_evaluated(config, stack, checkpoint=checkpoint, policy=policy_name, begun=before, pin=pin)
    evaluation = Evaluation(Runs([loaded.setup]), stack)
    if is_writer() and evaluation.remarks:
        print("\n".join(evaluation.remarks), file=sys.stderr)
    book, of_samples = None, dict[str, Any]()
    if results is not None:
        of_samples = about(loaded, evaluation.streams)
        book = Results(results, of_samples, stack)
    found = evaluation.run(0, loaded.params, seed=config.seed, results=book)
    if book:
        book.finish()
    return found, evaluation, of_samples


def main() -> None:
    checkpoint = dict(type=Path, metavar="DIR", help="a run, its checkpoints/STEP, or a model directory")
    policy_help = "in its place a model directory, or ORG/NAME or ORG/NAME@REVISION on the hub"
    results = dict(type=Path, metavar="FILE.parquet", help="keeps every sample; killed, the evaluation goes on from it")
    flags: dict[str, dict[str, Any]] = {
        "--checkpoint": checkpoint,
        "--policy": dict(metavar="DIR_OR_HUB", help=policy_help),
        "--results": results,
        **peers.FLAGS,
    }
    config, arguments = cli.parse(__doc__.split("\n")[0], flags, first=peers.join)
    found = evaluate(config, arguments.checkpoint, policy_name=arguments.policy, results=arguments.results)
    if not is_writer():
        return
    width = max(map(len, found))
    print("\n".join(f"{name:{width}}  {value:.4g}" for name, value in found.items()))


if __name__ == "__main__":
    peers.run_main(main)
