"""The figures, drawn from logs that RunLog wrote."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread

from dppo_jax.errors import UserError
from dppo_jax.run_log import RunLog, write_config
from experiments.plot import draw, group_runs, main, moving_average

ROOT = Path(__file__).parent.parent
TAGS = {
    "reward/mean": "Reward",
    "mismatch/abs_prob_diff_mean": "Mismatch: mean |π − μ| before any update",
    "trust_region/masked": "Masked fraction of tokens",
    "policy/entropy": "Entropy (nats)",
}


def write_run(folder: Path, series: dict[str, list[float]], every: int = 1, **config) -> str:
    if config:
        write_config(folder, config, resuming=False)
    with RunLog(folder, hparams=config, resume_step=0, total_steps=1) as log:
        for i in range(max(map(len, series.values()))):
            log.scalars(i * every, {tag: values[i] for tag, values in series.items() if i < len(values)})
    return str(folder)


def panels(figure) -> dict[str, plt.Axes]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.axison}


def curve(axis, line: int = 0) -> list[tuple[float, float]]:
    return [tuple(point) for point in axis.lines[line].get_xydata().tolist()]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tv (3 runs)", "cispo_seed0"]
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
    assert [method.label for method in group_runs(runs)] == [label]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [write_run(tmp_path / parent / "run", {"reward/mean": [1.0]}) for parent in "ab"]
    assert [method.label for method in group_runs(runs)] == ["a/run", "b/run"]
    assert [method.label for method in group_runs([runs[0], f"{runs[0]}/tb"])] == ["run"]


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
        (["--runs", "RUN", "--out", "a.png", "--smooth", "0"], "--smooth must be 1 or more, not 0"),
        (["--runs", "RUN", "--out", "a.png", "--smooth", "x"], "invalid int value: 'x'"),
        (["--runs", "RUN", "--out", "a.png", "--smoth", "3"], "unknown argument '--smoth'; the nearest is '--smooth'"),
        (["--runs", "RUN", "nowhere", "--out", "a.png"], "nowhere' does not exist"),
        (["--runs", "EMPTY", "--out", "a.png"], "holds no TensorBoard event file"),
        (["--runs", "OTHER", "--out", "a.png"], "logged none of reward/mean"),
        (["--runs", "BROKEN", "--out", "a.png"], "not valid JSON"),
        (["--runs", "RUN", "--out", "RUN/config.json/a.png"], "cannot make the folder"),
        (["--runs", "RUN", "--out", "FOLDER.png"], "cannot write"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, complaint):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FOLDER.png").mkdir()
    write_run(tmp_path / "RUN", {"reward/mean": [0.0]}, seed=0)
    write_run(tmp_path / "OTHER", {"time/train": [0.0]})
    write_run(tmp_path / "BROKEN", {"reward/mean": [0.0]}, seed=0)
    (tmp_path / "BROKEN" / "config.json").write_text("{")
    places = ("RUN", "EMPTY", "OTHER", "BROKEN", "FOLDER")
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
