"""The benchmark's own promises: the same work on every side, rows with their keys, clear refusals. No speed."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.models.config import config_from_hf
from dppo_jax.models.decoder import abstract_params
from experiments.benchmark import workloads
from experiments.benchmark.__main__ import PAIRS, Bench, Pair, flops, peers, shown, wanted
from experiments.benchmark.ours import TABLE, config_of
from experiments.benchmark.processor import described
from experiments.benchmark.worker import Worker
from experiments.benchmark.workloads import WORKLOADS
from tests.helpers.places import ROOT

OURS = [sys.executable, "-m", "experiments.benchmark.ours"]
ENV = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def test_a_long_rollout_reads_what_it_says():
    """The embedded model's: pages read no more than is live, blocks more; the same tokens and steps."""
    told = {}
    for cache in ("pages", "blocks"):
        command = [sys.executable, "-m", "experiments.benchmark.long_rollout", "--config", "configs/quickstart.py"]
        settings = ["slots=4", f"cache={cache}", "max_new_tokens=300", "prompts=2", "group_size=4"]
        changes = [f"--config.rollout.{setting}" for setting in settings]
        out = subprocess.run(
            [*command, "--lengths", "uniform:200:300", "--config.train.minibatches=1", *changes],
            cwd=ROOT,
            env=ENV,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr[-2000:]
        told[cache] = json.loads(out.stdout.splitlines()[-1])
    pages, blocks = told["pages"], told["blocks"]
    assert pages["read_over_live"] == 1 < blocks["read_over_live"]
    assert pages["tokens"] == blocks["tokens"] > 200 * 4
    assert pages["decode_steps"] == blocks["decode_steps"] >= pages["decode_steps_without_tail"]
    assert pages["read_share"] == pages["live_share"] and blocks["read_share"] > blocks["live_share"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--lengths", "uniform:1:1"], "no response has a second token"),
        (["--lengths", "uniform:2:9", "--config.rollout.in_flight=1"], "rollout.in_flight = 1, but one rollout"),
        (["--lengths", "lognormal:10:1e200"], "SIGMA from 0 to 5"),
    ],
)
def test_a_long_rollout_that_measures_nothing_is_refused(arguments, sentence):
    command = [sys.executable, "-m", "experiments.benchmark.long_rollout", "--config", "configs/quickstart.py"]
    out = subprocess.run([*command, *arguments], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.returncode == 2 and sentence in out.stderr.splitlines()[-1] and "Traceback" not in out.stderr


def test_a_long_tail_has_the_mean_of_a_quarter_of_its_maximum():
    lengths = workloads.lengths(WORKLOADS["L"])
    assert lengths.shape == (512,) and lengths.min() >= 1 and lengths.max() == 256
    assert lengths.mean() == pytest.approx(64, rel=0.02)
    assert np.median(lengths) < 0.75 * lengths.mean()
    np.testing.assert_array_equal(lengths, workloads.lengths(WORKLOADS["L"]))
    assert (workloads.lengths(WORKLOADS["S"]) == 64).all()


def test_every_side_sees_the_same_tokens():
    w = WORKLOADS["L"]
    tokens, lengths = workloads.response_tokens(w), workloads.lengths(w)
    assert ((tokens != 0).sum(axis=1) == lengths).all()  # 0 pads, and is never drawn
    rows = workloads.prompt_rows(w).reshape(w.prompts, w.group_size, -1)
    assert (rows == workloads.prompt_tokens(w)[:, None]).all()
    grouped = workloads.advantages(w).reshape(w.prompts, w.group_size)
    np.testing.assert_allclose(grouped.mean(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("name", WORKLOADS)
def test_operations_of_a_token_are_two_for_each_weight_in_a_product(name):
    """Against the shapes of the model: every matrix is used once, the tied embedding as the head."""
    params = abstract_params(config_from_hf(workloads.hf_config(WORKLOADS[name]), "test"))
    matrices = [p for n, p in params["layers"].items() if p.ndim == 3] + [params["embed"]]
    weights = sum(p.size for p in matrices)
    assert flops(WORKLOADS[name], train=False) == 2 * weights
    assert flops(WORKLOADS[name], train=True) == 6 * weights


def test_every_pair_of_ours_is_in_our_table():
    for pair in PAIRS:
        assert (pair.workload, pair.metric) in TABLE
        assert pair.peer != "ours" or (pair.workload, pair.peer_metric) in TABLE


def test_the_configs_are_those_of_the_issue():
    c = config_of(WORKLOADS["S"], loss__name="dppo_topk_tv")
    assert (c.rollout.prompts, c.rollout.group_size, c.rollout.max_new_tokens, c.data.max_prompt_len) == (8, 4, 64, 16)
    assert (c.policy.dtype, c.rollout.dtype) == ("float32", "float32")
    assert (c.rollout.tracked, c.loss.name) == (20, "dppo_topk_tv")


def test_two_sides_of_the_head_in_turns():
    """Real processes; compiled memory is no timing, so its ratio can be held to the bar of a tenth."""
    pair = Pair("head", "memory", "ours", "full memory", "full logits", ("tokens/s", "peak bytes", "compile s"))
    rows = list(Bench({"ours": (OURS, ENV)}, repeats=1).pair(pair))
    assert [row.metric for row in rows] == ["memory, tokens/s", "memory, peak bytes", "memory, compile s"]
    for row in map(dataclasses.asdict, rows):
        assert row.keys() == {"workload", "metric", "ours", "peer", "peer_name", "ratio", "repeats"}
        assert row["ratio"] > 0 and row["ours"] > 0 and row["peer"] > 0
        json.dumps(row)
    assert rows[1].ratio == rows[1].peer / rows[1].ours
    assert len(shown(rows).splitlines()) == 4
    with Worker(OURS, ENV) as worker:
        found = []
        for metric in ("memory", "full memory"):
            worker.ask({"do": "setup", "workload": "head", "metric": metric})
            found.append(worker.ask({"do": "run", "workload": "head", "metric": metric}))
        ours, full = found
        assert full["bytes"] > full["logits_bytes"] > 10 * ours["bytes"]
        with pytest.raises(UserError, match=r"\('S', 'rollouts'\); there are"):
            worker.ask({"do": "setup", "workload": "S", "metric": "rollouts"})


def test_what_is_asked_for_wrongly_is_named():
    with pytest.raises(UserError, match="there is no 'S.rollot'; the nearest is 'S.rollout'"):
        wanted("M,S.rollot")
    assert wanted(None) == [] and wanted("M,L.rollout") == ["M", "L.rollout"]
    with pytest.raises(UserError, match="cannot start the worker"), Worker(["/no/python"], {}):
        pass
    assert peers("/tunix/python", "/torch/python").keys() == {"ours", "torch", "tunix"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "error: --repeats must be at least 1, not 0"),
        (["--json", "/no/folder/f.json"], "error: --json: there is no folder /no/folder"),
        (["--only", "X"], "error: --only: there is no 'X'"),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments, sentence):
    line = [sys.executable, "-m", "experiments.benchmark", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(sentence)


@pytest.mark.parametrize(
    ("cpuinfo", "said"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu sse2 avx2 avx512f\n",
            "AMD EPYC 9654, AVX-512, vectors of 512 bits",
        ),
        ("model name\t: Some CPU @ 2 GHz \nflags\t\t: sse2 avx avx2\n", "Some CPU @ 2 GHz, AVX2, vectors of 256 bits"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "NEON, vectors of 128 bits"),
        ("", "vectors of unknown width"),
    ],
)
def test_a_processor_has_a_name_and_a_vector_width(cpuinfo, said):
    assert described(cpuinfo).endswith(said)
