"""experiments.questions.estimates and experiments.questions.mismatch on a small model, as commands."""

import json
import subprocess
import sys

import pytest

from tests.helpers.fixtures import config_file, hurried_environment, tiny
from tests.helpers.places import ROOT


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    config = config_file(folder / "config.py", tiny(tmp_path_factory))

    def run(module: str, *arguments: str):
        return subprocess.run(
            [sys.executable, "-m", module, "--config", str(config), "--out", str(folder / module), *arguments],
            cwd=ROOT,
            env=hurried_environment(tmp_path_factory),
            capture_output=True,
            text=True,
        ), folder / module

    return run


def test_estimates_are_ordered(command):
    done, out = command("experiments.questions.estimates", "--updates", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "estimates.json").read_text())
    for kind in ("tv", "kl"):
        rows = result[kind]["estimates"]
        means = [rows[name]["mean"] for name in ("binary", "top-1", "top-5", "exact")]
        assert 0 < means[0] and all(a <= b * (1 + 1e-4) for a, b in zip(means, means[1:], strict=False))
        assert all(row["above exact by at most"] < 1e-4 for row in rows.values())
        assert rows["exact"]["flipped at paper"] == 0 and rows["exact"]["masked at 0.9-quantile"] > 0
        assert rows["binary"]["masked at 0.9-quantile"] < rows["exact"]["masked at 0.9-quantile"]
    assert "top-100" not in result["tv"]["estimates"]  # more than the vocabulary
    assert (out / "estimates.png").stat().st_size > 10_000 and "| binary |" in (out / "estimates.md").read_text()


def test_mismatch_grows_with_rounding(command):
    found = []
    for bits in ("m10", "m4"):
        done, out = command("experiments.questions.mismatch", f"--config.rollout.activations={bits}")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((out / "mismatch.json").read_text()))
    assert found[1]["abs_prob_diff_mean"] > 5 * found[0]["abs_prob_diff_mean"] > 0
    assert found[0]["floor_abs_prob_diff_mean"] < 1e-6 < found[0]["abs_prob_diff_mean"]
    # |pi - mu| of the sampled token is half of the total variation at most where the rest moves too.
    assert all(one["exact_tv_mean"] >= one["abs_prob_diff_mean"] * (1 - 1e-3) for one in found)
    assert (out / "mismatch.png").stat().st_size > 10_000
    page = (out / "report.md").read_text()
    assert page == done.stdout and "\n- The passes part at layer 0: " in page
    assert "rollout and training differ in inputs of linear layers (rounded to m4, as they are)." in page
    assert "| inputs of linear layers | rounded to m4 | as they are | differs |" in page
    assert "| dtype | float32 | float32 |  |" in page and "region" in found[1]["verdict"]
    assert {"reinforce", "cispo"} <= {*found[1]["regions"]["without"]} and "`dppo_topk_tv`" in page
    by_position, by_probability = (
        [one["tokens"] for one in found[1][bins].values()] for bins in ("by_position", "by_probability")
    )
    assert sum(by_position) == sum(by_probability) == found[1]["tokens"]


def test_a_critic_cannot_be_probed(command):
    done, _ = command("experiments.questions.mismatch", "--config.advantage.name=gae")
    assert done.returncode != 0 and "gae needs a critic" in done.stderr and "Traceback" not in done.stderr
