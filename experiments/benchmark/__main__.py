"""Speed and memory as ratios, on fixed workloads, against what people would use instead.

    python -m experiments.benchmark [--json F] [--repeats 5] [--only S,L.rollout] [--tunix PYTHON] [--torch PYTHON]

Each side runs in a process of its own and they take turns: a ratio is the median over pairs of runs next to each
other. PyTorch with transformers is a peer if this Python has it, or the one that --torch names; google-tunix if --tunix
names a Python that has it. A ratio above 1 says that ours is better.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dppo_jax.errors import UserError, nearest, run_main
from dppo_jax.models.config import config_from_hf
from dppo_jax.models.flops import weight_flops
from experiments.benchmark.processor import processor
from experiments.benchmark.worker import Worker
from experiments.benchmark.workloads import WORKLOADS, Workload, hf_config
from experiments.run.cli import Parser, whole

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `ours` and `peer` are in the metric's unit; `ratio` above 1: ours is better."""

    workload: str
    metric: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    repeats: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two sides of the same work: (side, metric as the side names it). What is compared is in `measures`."""

    workload: str
    metric: str
    peer: str  # "ours", "tunix", "torch"
    peer_metric: str
    peer_name: str
    measures: tuple[str, ...] = ("tokens/s",)


PAIRS = (
    Pair("S", "rollout", "tunix", "rollout", "tunix"),
    Pair("S", "train", "tunix", "train", "tunix"),
    Pair("S", "step", "tunix", "step", "tunix", ("tokens/s", "compile s", "peak bytes")),
    Pair("S", "train", "torch", "train", "PyTorch"),
    Pair("S", "train dppo_binary_tv", "ours", "train", "ppo_clip"),
    Pair("S", "train dppo_topk_tv", "ours", "train", "ppo_clip"),
    Pair("S", "train ten regions", "ours", "train", "no regions measured"),
    Pair("L", "rollout", "tunix", "rollout", "tunix, 64 rows a call"),
    Pair("L", "rollout", "tunix", "rollout_one_call", "tunix, 512 rows a call"),
    Pair("L", "rollout", "ours", "static rollout", "ours, static batch"),
    Pair("L", "rollout in flight", "ours", "rollout", "ours, a batch at a time"),
    Pair("L", "train", "ours", "unpacked train", "ours, not packed"),
    Pair("M", "rollout", "torch", "rollout", "transformers generate"),
    Pair("M1", "rollout", "torch", "rollout", "transformers generate"),
    Pair("M", "train", "torch", "train", "PyTorch"),
)


def flops(workload: Workload, train: bool) -> float:
    """Floating-point operations of a token: 2 for every weight in a product, 6 when trained; attention left out."""
    model = config_from_hf(hf_config(workload), "the benchmark's")
    return (3 if train else 1) * weight_flops(model, tokens=1, predicted=1)


class Bench:
    """Starts the sides and asks them in turns."""

    def __init__(self, commands: dict[str, tuple[list[str], dict[str, str]]], repeats: int):
        self._commands, self._repeats = commands, repeats
        self.compilations = 0  # our compilations after the warm-up

    def _side(self, name: str) -> Worker:
        return Worker(*self._commands[name])

    def pair(self, pair: Pair) -> Iterator[Row]:
        """Both sides set up, then run in turns."""
        sides = {"ours": pair.metric, "peer": pair.peer_metric}
        requests = {side: {"workload": pair.workload, "metric": metric} for side, metric in sides.items()}
        with contextlib.ExitStack() as stack:
            workers = {
                "ours": stack.enter_context(self._side("ours")),
                "peer": stack.enter_context(self._side(pair.peer)),
            }
            ready = {side: worker.ask({"do": "setup", **requests[side]}) for side, worker in workers.items()}
            seconds: dict[str, list[float]] = {"ours": [], "peer": []}
            for _ in range(self._repeats):
                for side, worker in workers.items():
                    run = worker.ask({"do": "run", **requests[side]})
                    seconds[side].append(run["seconds"])
                    self.compilations += run["compilations"] or 0 if side == "ours" else 0
            peaks = {side: worker.ask({"do": "peak"})["peak_bytes"] for side, worker in workers.items()}
        ours, peer = (ready[side]["tokens"] / statistics.median(seconds[side]) for side in ("ours", "peer"))
        tokens = ready["ours"]["tokens"] / ready["peer"]["tokens"]  # the same, but for what is drawn
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)) * tokens
        for measure in pair.measures:
            name = f"{pair.metric}, {measure}"
            if measure == "tokens/s":
                yield Row(pair.workload, name, ours, peer, pair.peer_name, ratio, self._repeats)
                continue
            got = peaks if measure == "peak bytes" else {s: ready[s]["compile_seconds"] for s in ready}
            yield Row(pair.workload, name, got["ours"], got["peer"], pair.peer_name, got["peer"] / got["ours"], 1)

    @functools.cached_property
    def rates(self) -> dict[str, Any]:
        """Of this machine: products and reading, the best of several times."""
        request = {"workload": "machine", "metric": "rates"}
        with self._side("ours") as worker:
            worker.ask({"do": "setup", **request})
            runs = [worker.ask({"do": "run", **request}) for _ in range(self._repeats)]
        return {key: max(run[key] for run in runs) for key in runs[0]}

    def machine(self) -> Iterator[Row]:
        """What every other row depends on."""
        kind, matmul, read = (self.rates[key] for key in ("dtype", "flops_per_second", "bytes_per_second"))
        yield Row("machine", f"{kind} matmul, GFLOP/s", matmul / 1e9, None, processor(), None, self._repeats)
        yield Row("machine", "memory read, GB/s", read / 1e9, None, "", None, self._repeats)

    def alone(self) -> Iterator[Row]:
        """What needs no peer: the shares of the machine's rates that we reach, memory, occupancy.

        On an accelerator the shares are those of workload G, in bfloat16.
        """
        with self._side("ours") as worker:

            def ask(workload: str, metric: str) -> dict[str, Any]:
                request = {"workload": workload, "metric": metric}
                worker.ask({"do": "setup", **request})
                runs = [worker.ask({"do": "run", **request}) for _ in range(self._repeats)]
                worker.ask({"do": "drop", **request})
                return min(runs, key=lambda run: run["seconds"])

            def row(workload: str, metric: str, ours: float, peer: float | None, peer_name: str) -> Row:
                ratio = None if peer is None else ours / peer
                return Row(workload, metric, ours, peer, peer_name, ratio, self._repeats)

            rates = self.rates
            for name in ("S", "M") if rates["platform"] == "cpu" else ("G",):
                w, run = WORKLOADS[name], ask(name, "train")
                rate = run["tokens"] * flops(w, train=True) / run["seconds"]
                yield row(name, "train, FLOP/s", rate, rates["flops_per_second"], "machine's matmul rate")
                run = ask(name, "rollout")
                rate = run["tokens"] * flops(w, train=False) / run["seconds"]
                yield row(name, "rollout, FLOP/s", rate, rates["flops_per_second"], "machine's matmul rate")
                # Every step reads every weight, and each row's cache: on average its prompt and half of its response.
                cache = 2 * w.num_layers * w.num_kv_heads * w.head_dim * (w.prompt_length + w.max_new_tokens / 2)
                size = {"float32": 4, "bfloat16": 2}[w.dtype]
                step = size * (flops(w, train=False) / 2 + w.rows * cache)
                rate = step * w.max_new_tokens / run["seconds"]
                yield row(name, "rollout, bytes/s", rate, rates["bytes_per_second"], "machine's memory rate")
            yield row("L", "train, real tokens among positions", ask("L", "train")["occupancy"], None, "")
            ours, full = ask("head", "memory"), ask("head", "full memory")
            yield Row(
                "head", "temp bytes", ours["bytes"], full["bytes"], "full logits", full["bytes"] / ours["bytes"], 1
            )


def shown(rows: list[Row]) -> str:
    """The table."""
    head = ("workload", "metric", "ours", "peer", "peer's name", "ratio", "repeats")
    number = lambda x: "" if x is None else f"{x:.4g}"  # noqa: E731
    lines = [head] + [
        (r.workload, r.metric, number(r.ours), number(r.peer), r.peer_name, number(r.ratio), str(r.repeats))
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def peers(tunix: Path | None, torch: Path | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The command of each side that there is."""
    path = {"PYTHONPATH": str(ROOT)}
    commands = {"ours": ([sys.executable, "-m", "experiments.benchmark.ours"], path)}
    if torch is None and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        torch = Path(sys.executable)
    if torch is not None:
        commands["torch"] = ([str(torch), "-m", "experiments.benchmark.peer_torch"], path)
    if tunix is not None:
        commands["tunix"] = ([str(tunix), str(ROOT / "experiments/benchmark/peer_tunix.py")], path)
    return commands


def wanted(only: str | None) -> list[str]:
    """The names that --only asks for; none: everything."""
    known = {"alone"} | {p.workload for p in PAIRS} | {f"{p.workload}.{p.metric}" for p in PAIRS}
    names = [] if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--only: there is no {name!r}{nearest(name, known)}")
    return names


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows there too")
    parser.add_argument("--repeats", type=whole(1, 1000), default=5, metavar="N", help="pairs of runs (5)")
    parser.add_argument("--only", metavar="NAMES", help="workloads or WORKLOAD.METRIC, by commas; alone: without peers")
    parser.add_argument("--tunix", type=Path, metavar="PYTHON", help="a Python that has google-tunix")
    parser.add_argument("--torch", type=Path, metavar="PYTHON", help="one that has torch and transformers, if not this")
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: there is no folder {arguments.json.parent}")
    only = wanted(arguments.only)
    commands = peers(arguments.tunix, arguments.torch)
    bench = Bench(commands, arguments.repeats)
    rows: list[Row] = []

    def keep(new_rows: Iterator[Row]) -> None:
        for row in new_rows:
            rows.append(row)
            print(shown([row]).split("\n")[1], file=sys.stderr, flush=True)

    for pair in PAIRS:
        if pair.peer in commands and (not only or {pair.workload, f"{pair.workload}.{pair.metric}"} & set(only)):
            keep(bench.pair(pair))
    if not only or "alone" in only:
        keep(bench.alone())
    keep(bench.machine())
    rows.append(Row("all", "our compilations after warm-up", bench.compilations, None, "", None, arguments.repeats))
    print(shown(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
