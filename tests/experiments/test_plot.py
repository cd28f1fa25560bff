"""The figures, drawn from logs that RunLog wrote."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from scipy import stats

from dppo_jax.errors import UserError
from dppo_jax.storage.run_config import write_config
from dppo_jax.storage.run_log import RunLog
from experiments.plot import bootstrap_interval, draw, exponential_average, group_runs, main, moving_average
from experiments.plot.figure import choose, remarks
from tests.helpers.places import ROOT

TAGS = {
    "reward/mean": "Reward",
    "mismatch/abs_prob_diff_mean": "Mismatch: mean |π − μ| before any update",
    "trust_region/masked": "Masked fraction of tokens",
    "policy/entropy": "Entropy (nats)",
}


def write_run(folder: Path, series: dict[str, list[float]], every: int = 1, **config) -> str:
    if config:
        write_config(folder, config)
    with RunLog(folder, hparams=config, resume_step=0, total_steps=1) as log:
        for i in range(max(map(len, series.values()))):
            log.scalars(i * every, {tag: values[i] for tag, values in series.items() if i < len(values)})
    return str(folder)


def panels(figure) -> dict[str, Axes]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.axison}


def curve(axis, line: int = 0) -> list[tuple[float, float]]:
    return [tuple(point) for point in axis.lines[line].get_xydata().tolist()]


def labels(*runs: str, key: str | None = None) -> list[str]:
    return [curve.label for curve in group_runs(runs, key)]


def test_a_quickstart_figure_holds_its_four_panels(tmp_path):
    run = write_run(tmp_path / "quickstart", dict.fromkeys(TAGS, [0.25, 0.5, 0.75]))
    figure = draw(group_runs([run]))
    assert list(panels(figure)) == list(TAGS.values())
    for axis in panels(figure).values():
        assert curve(axis) == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert figure.get_suptitle() == "quickstart"


def test_evaluations_follow_the_reward_and_absent_tags_have_no_panel(tmp_path):
    tags = ["grad_norm", "response/length_mean", "policy/abs_prob_diff_mean", "eval/aime24/avg", "time/train", *TAGS]
    run = write_run(tmp_path / "run", {**dict.fromkeys(tags, [1.0, 2.0]), "eval/products/avg": [0.5]}, every=10)
    titles = list(panels(draw(group_runs([run]), smooth=9)))
    assert titles[:3] == ["Reward", "Evaluation: aime24", "Evaluation: products"]
    assert titles[-2:] == ["Response length (tokens)", "Gradient norm"] and len(titles) == 9
    other = write_run(tmp_path / "other", {"reward/mean": [0.0]})
    figure = draw(group_runs([run, other]))
    assert [len(axis.lines) for axis in panels(figure).values()] == [2] + [1] * 8
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run", "other"]


def test_runs_that_differ_in_the_seed_are_a_mean_in_a_band(tmp_path):
    rewards = {0: [0.0, 1.0, 2.0], 1: [1.0, 1.0, 4.0], 2: [2.0, 1.0, 3.0, 9.0]}
    runs = [
        write_run(tmp_path / f"tv_seed{seed}", {"reward/mean": r}, seed=seed, loss={"name": "dppo_binary_tv"})
        for seed, r in rewards.items()
    ]
    runs += [write_run(tmp_path / "cispo_seed0", {"reward/mean": [5.0]}, seed=0, loss={"name": "cispo"})]
    figure = draw(group_runs([runs[0], runs[3], runs[1], runs[2], runs[0]]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dppo_binary_tv (3 runs)", "cispo"]
    assert figure.get_supxlabel() == "line: mean over seeds, band: its 95% bootstrap interval"
    axis = panels(figure)["Reward"]
    assert curve(axis) == [(0, 1.0), (1, 1.0), (2, 3.0)]  # the steps that all of them have
    assert curve(axis, 1) == [(0, 5.0)]
    (band,) = axis.collections
    corners = set(map(tuple, band.get_paths()[0].vertices.tolist()))
    assert corners == {(0, 0), (0, 2), (1, 1), (2, 2), (2, 4)}


@pytest.mark.parametrize(
    "names, label",
    [
        (("a-1", "a-2"), "a (2 runs)"),
        (("run_10", "run_11"), "run (2 runs)"),
        (("losses", "losses_x"), "losses (2 runs)"),
        (("0", "1"), "0 (2 runs)"),
    ],
)
def test_seeds_share_the_common_part_of_their_names(tmp_path, names, label):
    runs = [write_run(tmp_path / n, {"reward/mean": [1.0]}, seed=i, steps=1) for i, n in enumerate(names)]
    assert [curve.label for curve in group_runs(runs)] == [label]


def test_a_curve_is_named_by_a_key_of_the_config(tmp_path):
    def run(name: str, loss: str = "cispo", seed: int = 0, **others) -> str:
        loss_section = {"name": loss, "ratio_cap": others.pop("cap", 5.0)}
        return write_run(tmp_path / name, {"reward/mean": [1.0]}, seed=seed, loss=loss_section, **others)

    seeds = [run(f"s{seed}", seed=seed) for seed in range(3)]
    assert labels(*seeds, run("tv", "dppo_binary_tv")) == ["cispo (3 runs)", "dppo_binary_tv"]
    assert labels(*seeds, key="seed") == ["seed=0", "seed=1", "seed=2"]
    low = run("low", rate=1e-4)
    both = [low, run("high", rate=1e-3), run("higher", rate=1e-3, seed=1)]
    assert labels(*both) == ["cispo, rate=0.0001", "cispo, rate=0.001 (2 runs)"]
    assert labels(*both, key="rate") == ["rate=0.0001", "rate=0.001 (2 runs)"]
    assert labels(low, run("other", rate=1e-3, cap=3.0, steps=9)) == ["cispo: low", "cispo: other"]
    assert labels(low, seeds[0], key="loss.ratio_cap") == [
        "loss.ratio_cap=5, rate=0.0001",
        "loss.ratio_cap=5, rate=unset",
    ]
    bare = write_run(tmp_path / "cispo", {"reward/mean": [1.0]})
    assert labels(low, bare) == ["low", "cispo"]  # a folder of that name: no two curves share a label


def test_a_curve_of_a_sweep_is_named_by_its_method(tmp_path):
    def run(name: str, loss: str, seed: int, **others) -> str:
        folder = tmp_path / name / f"seed_{seed}"
        return write_run(folder, {"reward/mean": [1.0]}, seed=seed, loss={"name": loss}, **others)

    runs = [run(name, "ppo_clip", seed, A=name) for name in ("dr_grpo", "max_rl") for seed in range(2)]
    assert labels(*runs) == ["dr_grpo (2 runs)", "max_rl (2 runs)"]
    assert labels(*runs, key="loss.name") == ["ppo_clip, A=dr_grpo (2 runs)", "ppo_clip, A=max_rl (2 runs)"]
    slow, other = run("dr_grpo_x0.3", "ppo_clip", 0, A="dr_grpo", rate=0.3), run("dr_grpo_x1e-05", "cispo", 0)
    assert labels(runs[0], slow) == ["dr_grpo, rate=unset", "dr_grpo, rate=0.3"]
    assert labels(runs[0], other) == ["dr_grpo", "cispo"]  # what a folder says of another loss is not believed


def test_the_interval_is_the_percentile_bootstraps():
    values = np.random.default_rng(3).normal(size=(7, 4))
    low, high = bootstrap_interval(values)
    rng = np.random.default_rng(5)
    want = stats.bootstrap((values,), np.mean, axis=0, n_resamples=20_000, method="percentile", rng=rng)
    np.testing.assert_allclose(low, want.confidence_interval.low, atol=0.06)
    np.testing.assert_allclose(high, want.confidence_interval.high, atol=0.06)
    np.testing.assert_array_equal(low, bootstrap_interval(values)[0])  # seeded
    assert np.isnan(bootstrap_interval(np.array([[1.0, np.nan], [2.0, 3.0]]))[0]).tolist() == [False, True]


def test_extremes_share_a_panel_and_bad_updates_have_one(tmp_path):
    tags = {
        "policy/prob_diff_max": [0.5, 0.75],
        "policy/prob_diff_min": [-0.5, -0.25],
        "trust_region/bad_updates": [0.1],
    }
    shown = panels(draw(group_runs([write_run(tmp_path / "run", tags)])))
    assert list(shown) == ["Largest and smallest π − μ", "Bad updates: A < 0 and μ − π ≥ 0.5"]
    axis = shown["Largest and smallest π − μ"]
    assert [curve(axis, i) for i in range(2)] == [[(0, 0.5), (1, 0.75)], [(0, -0.5), (1, -0.25)]]


def test_tags_replace_the_panels(tmp_path):
    series = dict.fromkeys(["reward/mean", "region/a/masked", "region/b/masked", "eval/sums/pass@2"], [0.5])
    curves = group_runs([write_run(tmp_path / "run", series)])
    shown = list(panels(draw(curves, tags=["region/*/masked", "region/a/*", "eval/*", "reward/mean"])))
    assert shown == ["region/a/masked", "region/b/masked", "eval/sums/pass@2", "Reward"]
    assert remarks(curves, ["reward/mean"]) == []
    assert len(choose(curves)) == 1


def test_what_is_left_out_is_said(tmp_path, capsys):
    series = {"reward/mean": [0.0, 0.5, 1.0], "policy/entropy": [1.0]}
    runs = [write_run(tmp_path / "s0", series, seed=0, loss={"name": "cispo"})]
    runs += [write_run(tmp_path / "s1", {"reward/mean": [0.0, 0.5]}, seed=1, loss={"name": "cispo"})]
    main(["--runs", *runs, "--out", str(tmp_path / "a.png")])
    absent, without, shortest = capsys.readouterr().err.splitlines()
    assert absent.startswith("left out, as no run logged them: mismatch/abs_prob_diff_mean, ")
    assert "policy/prob_diff_max, policy/prob_diff_min" in absent and "reward/mean" not in absent
    assert without == "cispo (2 runs): drawn without those of its runs that did not log policy/entropy"
    assert shortest == "cispo (2 runs): its curves end with the shortest of its runs, reward/mean at step 1"


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [write_run(tmp_path / parent / "run", {"reward/mean": [1.0]}) for parent in "ab"]
    assert [curve.label for curve in group_runs(runs)] == ["a/run", "b/run"]
    assert [curve.label for curve in group_runs([runs[0], f"{runs[0]}/tb"])] == ["run"]


def test_names_that_matplotlib_would_read_otherwise_are_shown(tmp_path):
    runs = [write_run(tmp_path / name, {"reward/mean": [1.0]}) for name in ("_hidden", "$x_2$")]
    figure = draw(group_runs(runs))
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" _hidden", r"\$x_2\$"]


def test_smoothing_averages_the_points_around_and_skips_nan():
    values = np.array([1.0, 2.0, np.nan, 8.0, 16.0, np.nan, np.nan, np.nan])
    for width in (1, 2, 3, 4, 20):
        low, high = (width - 1) // 2, width // 2
        windows = [values[max(0, i - low) : i + high + 1] for i in range(values.size)]
        means = [w[np.isfinite(w)].mean() if np.isfinite(w).any() else np.nan for w in windows]
        np.testing.assert_allclose(moving_average(values, width), values if width == 1 else means)


def test_the_exponential_mean_is_weighted_by_age_and_skips_nan():
    values = np.array([np.nan, 1.0, 2.0, np.nan, 8.0, np.inf, 16.0])
    # Age counts the points that are there: as if the others were not in the list.
    known = values[np.isfinite(values)]
    means = [np.average(known[: n + 1], weights=0.7 ** np.arange(n, -1, -1)) for n in range(known.size)]
    want = [np.nan, means[0], means[1], means[1], means[2], means[2], means[3]]
    np.testing.assert_allclose(exponential_average(values, 0.7), want)


@pytest.mark.parametrize(
    "smooth, said",
    [
        (1, ""),
        (5, "smoothed: centred mean over 5 steps, but for evaluations"),
        (0.9, "smoothed: exponential mean, weight 0.9 on the past, but for evaluations"),
    ],
)
def test_the_figure_says_how_it_was_smoothed(tmp_path, smooth, said):
    series = {"reward/mean": [0.0, 1.0, 0.0], "eval/sums/avg": [0.0, 1.0, 0.0]}
    figure = draw(group_runs([write_run(tmp_path / "run", series)]), smooth)
    assert figure.get_supxlabel() == said
    axes = panels(figure)
    assert curve(axes["Evaluation: sums"]) == [(0, 0.0), (1, 1.0), (2, 0.0)]
    assert len(axes["Reward"].lines) == (1 if smooth == 1 else 2)  # the points themselves stay in sight


def test_scales_and_gaps_survive_zeros_nan_and_infinity(tmp_path):
    wide = [1e-8, 1e-3, 1.0]
    series = {
        "mismatch/abs_prob_diff_mean": [0.0, *wide],
        "policy/abs_prob_diff_mean": wide,
        "grad_norm": [np.nan, np.inf, np.nan],
        "reward/mean": [1.0, np.nan, 2.0],
    }
    figure = draw(group_runs([write_run(tmp_path / "run", series)]), smooth=2)
    figure.canvas.draw()
    scales = {title.split(":")[0]: axis.get_yscale() for title, axis in panels(figure).items()}
    assert scales == {"Reward": "linear", "Mismatch": "linear", "Policy shift": "log", "Gradient norm": "linear"}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_the_suffix_chooses_the_format(tmp_path, suffix, capsys):
    run = write_run(tmp_path / "run", {"reward/mean": [0.0, 1.0]})
    out = tmp_path / "new" / f"curves{suffix}"
    main(["--runs", run, "--out", str(out), "--smooth", "2"])
    assert capsys.readouterr().out == f"wrote {out}\n"
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix.lower()]
    assert out.read_bytes().startswith(start)
    if suffix == ".png":
        pixels = imread(out)
        assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--out", "a.png"], "--runs"),
        (["--runs", "RUN"], "--out"),
        (["--runs", "RUN", "--out", "a.jpg"], "must end in .png, .svg or .pdf"),
        (["--runs", "RUN", "--out", "a.png", "--smooth", "0"], "a fraction between 0 and 1, not '0'"),
        (["--runs", "RUN", "--out", "a.png", "--smooth", "2.5"], "--smooth must be a whole number of steps"),
        (["--runs", "RUN", "--out", "a.png", "--smooth", "nan"], "--smooth must be a whole number of steps"),
        (["--runs", "RUN", "--out", "a.png", "--smooth", "x"], "a fraction between 0 and 1, not 'x'"),
        (["--runs", "RUN", "--out", "a.png", "--group", "loss.nam"], "'loss.nam'; the nearest is 'loss.name'"),
        (["--runs", "RUN", "--out", "a.png", "--group", "loss"], "is a section of the config; name one of its keys"),
        (["--runs", "BARE", "--out", "a.png", "--group", "seed"], "holds no config.json"),
        (["--runs", "RUN", "--out", "a.png", "--tags", "reward/men"], "'reward/men'; the nearest is 'reward/mean'"),
        (["--runs", "RUN", "--out", "a.png", "--smoth", "3"], "unknown argument '--smoth'; the nearest is '--smooth'"),
        (["--runs", "RUN", "nowhere", "--out", "a.png"], "nowhere' does not exist"),
        (["--runs", "EMPTY", "--out", "a.png"], "holds no TensorBoard event file"),
        (["--runs", "OTHER", "--out", "a.png"], "logged none of reward/mean"),
        (["--runs", "BROKEN", "--out", "a.png"], "broken JSON"),
        (["--runs", "RUN", "--out", "RUN/config.json/a.png"], "cannot make the folder"),
        (["--runs", "RUN", "--out", "FOLDER.png"], "cannot write"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, complaint):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FOLDER.png").mkdir()
    write_run(tmp_path / "RUN", {"reward/mean": [0.0]}, seed=0, loss={"name": "cispo"})
    write_run(tmp_path / "BARE", {"reward/mean": [0.0]})
    write_run(tmp_path / "OTHER", {"time/train": [0.0]})
    write_run(tmp_path / "BROKEN", {"reward/mean": [0.0]}, seed=0)
    (tmp_path / "BROKEN" / "config.json").write_text("{")
    places = ("RUN", "BARE", "EMPTY", "OTHER", "BROKEN", "FOLDER")
    arguments = [str(tmp_path / a) if a.startswith(places) else a for a in arguments]
    with pytest.raises(UserError) as error:
        main(arguments)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_the_command_helps_and_fails_with_a_status():
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "experiments.plot", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "DISPLAY": ""})

    helped = run("--help")
    assert helped.returncode == 0 and "--smooth W" in helped.stdout
    failed = run("--runs", "nowhere", "--out", "a.png")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == "error: run folder 'nowhere' does not exist\n"
