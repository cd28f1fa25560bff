"""What RunLog writes, read back by TensorBoard's own readers."""

import fcntl
import html.parser
import json
import math
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from tensorboard.util import tensor_util

from dppo_jax.errors import UserError
from dppo_jax.storage.panels import PANELS
from dppo_jax.storage.run_log import (
    RunLog,
    Transcript,
    event_files,
    final_table,
    first_and_last,
    read_scalars,
    summary_table,
    transcript_table,
)

KEEP_ALL = {"scalars": 0, "histograms": 0, "tensors": 0}


def open_log(folder: Path, resume_step: int = 0, total_steps: int = 6, **hparams) -> RunLog:
    return RunLog(folder, hparams=hparams, resume_step=resume_step, total_steps=total_steps)


def write_rewards(folder: Path, rewards: dict[int, float], resume_step: int = 0, **hparams) -> None:
    with open_log(folder, resume_step, **hparams) as log:
        for step, reward in rewards.items():
            log.scalars(step, {"reward/mean": reward})


def multiplexer(logdir: Path) -> EventMultiplexer:
    """What `tensorboard --logdir` builds."""
    runs = EventMultiplexer(tensor_size_guidance={"scalars": 1000, "histograms": 1000})
    return runs.AddRunsFromDirectory(str(logdir)).Reload()


def tensors(logdir: Path, run: str, tag: str) -> list[tuple[int, np.ndarray]]:
    return [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in multiplexer(logdir).Tensors(run, tag)]


def hparams_table(logdir: Path, sort_by: str) -> list:
    """The rows of the HParams tab."""
    provider = MultiplexerDataProvider(multiplexer(logdir), str(logdir))
    request = api_pb2.ListSessionGroupsRequest(
        col_params=[{"hparam": sort_by, "order": "ORDER_ASC"}],
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS],
        slice_size=100,
    )
    context = Context(base_plugin.TBContext(data_provider=provider))
    return list(Handler(RequestContext(), context, "", request).run().session_groups)


# --- scalars and resuming ---


def test_scalars_are_read_back_with_their_tags_and_steps(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(3):
            log.scalars(step, {"reward/mean": np.float32(step / 4), "eval/AIME 24/avg": 0.5})
    reader = EventAccumulator(str(tmp_path / "tb"), KEEP_ALL).Reload()
    assert [(e.step, e.value) for e in reader.Scalars("reward/mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert sorted(reader.Tags()["scalars"]) == ["eval/AIME 24/avg", "reward/mean"]
    steps, values = read_scalars(tmp_path)["reward/mean"]
    np.testing.assert_array_equal(steps, [0, 1, 2])
    np.testing.assert_array_equal(values, [0, 0.25, 0.5])


def test_scalars_are_on_disk_before_the_run_is_closed(tmp_path):
    log = open_log(tmp_path)
    log.scalars(0, {"reward/mean": 0.5})
    assert read_scalars(tmp_path)["reward/mean"][1].tolist() == [0.5]
    log.close()
    log.close()


@pytest.mark.parametrize("resume_step", [0, 2])
def test_a_resumed_run_shows_each_step_once_with_its_last_value(tmp_path, resume_step):
    write_rewards(tmp_path, {0: 0.0, 1: 0.25, 2: 0.5})
    with open_log(tmp_path, resume_step=3) as crashed:
        crashed.scalars(3, {"reward/mean": 0.75})
        crashed.histogram(3, "ratio", [1], [0, 1])
    again = {step: 1.0 + step for step in range(resume_step, 5)}
    write_rewards(tmp_path, again, resume_step)
    expected = sorted({0: 0.0, 1: 0.25, **again}.items()) if resume_step else sorted(again.items())

    # All three start within one second or so: none may overwrite another.
    assert len(event_files(tmp_path)) == 3
    assert [(s, float(v)) for s, v in tensors(tmp_path, "tb", "reward/mean")] == expected
    reader = EventAccumulator(str(tmp_path / "tb"), KEEP_ALL).Reload()
    assert [(e.step, e.value) for e in reader.Scalars("reward/mean")] == expected
    assert reader.Histograms("ratio") == []
    steps, values = read_scalars(tmp_path)["reward/mean"]
    assert list(zip(steps.tolist(), values.tolist(), strict=True)) == expected


def test_events_go_on_in_further_files_and_every_reader_has_them_all(tmp_path):
    """Also where a run went back over steps that lie in several of them."""
    for start, end in ((0, 9), (3, 7)):
        log = RunLog(tmp_path, hparams={}, resume_step=start, total_steps=20, events_bytes=200)
        with log:
            for step in range(start, end):
                log.histogram(step, "ratio", [1, 2], [0, 1, 2])
                log.scalars(step, {"reward/mean": 10 * start + step})
    assert len(event_files(tmp_path)) > 8
    expected = [(step, float(step if step < 3 else 30 + step)) for step in range(7)]
    assert [(s, float(v)) for s, v in tensors(tmp_path, "tb", "reward/mean")] == expected
    reader = EventAccumulator(str(tmp_path / "tb"), KEEP_ALL).Reload()
    assert [(e.step, e.value) for e in reader.Scalars("reward/mean")] == expected
    assert [e.step for e in reader.Histograms("ratio")] == list(range(7))
    steps, values = read_scalars(tmp_path)["reward/mean"]
    assert list(zip(steps.tolist(), values.tolist(), strict=True)) == expected


def test_the_last_value_wins_within_one_process(tmp_path):
    write_rewards(tmp_path, {3: 0.0, 1: 0.25})
    with open_log(tmp_path, resume_step=4) as log:
        log.scalars(4, {"a": 1.0})
        log.scalars(4, {"a": 2.0})
    assert read_scalars(tmp_path)["a"][1].tolist() == [2.0]
    assert read_scalars(tmp_path)["reward/mean"][0].tolist() == [1, 3]


def test_a_record_cut_short_by_a_kill_hides_nothing_else(tmp_path):
    write_rewards(tmp_path, {0: 0.0, 1: 0.25, 2: 0.5})
    (file,) = event_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    write_rewards(tmp_path, {2: 0.75}, resume_step=2)
    steps, values = read_scalars(tmp_path)["reward/mean"]
    assert steps.tolist()[-1] == 2 and values.tolist()[-1] == 0.75 and steps[0] == 0


def test_a_process_that_is_not_the_writer_leaves_nothing(tmp_path, capfd):
    log = RunLog(tmp_path / "run", hparams={"a": 1}, resume_step=0, total_steps=1, is_writer=False)
    log.scalars(0, {"reward/mean": 1.0})
    log.histogram(0, "ratio", [1], [0, 1])
    log.text(0, "samples", "x")
    log.progress(0, {"reward/mean": 1.0})
    log.note("nobody hears")
    log.close()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


# --- histograms, text ---


def test_a_binned_histogram_is_shown_as_numpy_counts_it(tmp_path):
    values = np.random.default_rng(0).normal(1.0, 0.2, 500)
    edges = np.linspace(0, 2, 41)
    counts, _ = np.histogram(values, edges)
    with open_log(tmp_path) as log:
        log.histogram(7, "ratio", counts, edges)
    ((step, bins),) = tensors(tmp_path, "tb", "ratio")  # rows (left, right, count), what the Histograms tab draws
    assert step == 7
    used = slice(np.flatnonzero(counts)[0], np.flatnonzero(counts)[-1] + 1)
    np.testing.assert_allclose(bins, np.stack([edges[:-1], edges[1:], counts], 1)[used], rtol=1e-6)
    event = EventAccumulator(str(tmp_path / "tb"), KEEP_ALL).Reload().Histograms("ratio")[0].histogram_value
    assert event.num == 500
    assert event.sum / event.num == pytest.approx(values.mean(), abs=0.05)
    assert event.sum_squares / event.num == pytest.approx((values**2).mean(), abs=0.05)


def test_open_bins_are_as_wide_as_their_neighbours(tmp_path):
    with open_log(tmp_path) as log:
        log.histogram(0, "ratio", [1, 0, 2, 3], [-np.inf, 0, 1, 3, np.inf])
    ((_, bins),) = tensors(tmp_path, "tb", "ratio")
    np.testing.assert_array_equal(bins, [[-1, 0, 1], [0, 1, 0], [1, 3, 2], [3, 5, 3]])


def test_an_empty_histogram_writes_nothing_and_a_wrong_one_is_refused(tmp_path):
    with open_log(tmp_path) as log:
        log.histogram(0, "ratio", [0, 0], [0, 1, 2])
        for counts, edges in (([1, 2], [0, 1]), ([1, 2], [0, 2, 1]), ([[1]], [0, 1])):
            with pytest.raises(ValueError, match="n\\+1 increasing edges"):
                log.histogram(0, "ratio", counts, edges)
    assert EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["histograms"] == []


class Cells(html.parser.HTMLParser):
    """The text of each table cell; a tag that the table itself does not need is an intruder."""

    def __init__(self, document: str):
        super().__init__()
        self.cells: list[str] = []
        self.intruders: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        if tag == "td":
            self.cells.append("")
        elif tag == "br":
            self.cells[-1] += "\n"
        elif tag not in ("table", "thead", "tbody", "tr", "th"):
            self.intruders.append(tag)

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def shown(rows: list[Transcript], limit: int = 2000) -> list[list[str]]:
    page = Cells(markdown_to_safe_html(transcript_table(rows, limit)))
    assert not page.intruders
    cells = [cell.strip() for cell in page.cells]
    return [cells[i : i + 4] for i in range(0, len(cells), 4)]


HOSTILE = (
    "a|b\\|c",
    "first\nsecond\n\n| x | y |\n|---|---|",
    "**bold** _em_ `code` ```fence``` # head\n- item\n1. one\n> quote\n    indented",
    "<script>alert(1)</script> &amp; &#124; <|im_end|> </td></table> [link](http://x) ![i](y) http://x",
    "$x^2$ ~~s~~ \\boxed{6} [^1]: note",
    "日本語 é 👍🏽",
    "",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_model_says_stays_in_its_cell(text):
    rows = [Transcript(text, "reply", 1.0, "6"), Transcript("prompt", text, 0.5, text)]
    assert shown(rows) == [[text.strip(), "reply", "1", "6"], ["prompt", text.strip(), "0.5", text.strip()]]


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" \n"), max_size=40))
def test_a_cell_shows_the_text_that_went_in(text):
    assert shown([Transcript("p", f"[{text}]", 0.0, "a")]) == [["p", f"[{text}]", "0", "a"]]


def test_control_characters_and_broken_unicode_show_as_escapes(tmp_path):
    text = "a\tb\x00c\x02\x85\u2028\ud800"
    assert shown([Transcript("p", text, 0.0, "a")])[0][1] == r"a\tb\x00c\x02\x85\u2028\ud800"
    with open_log(tmp_path) as log:
        log.text(4, "samples", transcript_table([Transcript("p", text, 0.0, "a")]) + "\ud800")
    ((step, stored),) = tensors(tmp_path, "tb", "samples/text_summary")
    assert step == 4 and b"ud800" in stored.item()


def test_a_long_text_loses_its_middle():
    cell = shown([Transcript("p", "a" * 50 + "x" * 100 + "b" * 50, 0.0, "a")], limit=100)[0][1]
    assert cell == "a" * 50 + " [... 100 characters left out ...] " + "b" * 50


# --- hyperparameters ---


def test_the_hparams_tab_has_one_row_per_run_with_its_metrics(tmp_path):
    write_rewards(tmp_path / "cispo", {0: 0.25, 1: 0.5}, seed=0, loss={"name": "cispo", "ratio_cap": 3.0})
    write_rewards(tmp_path / "cispo", {1: 0.75}, resume_step=1, seed=0, loss={"name": "cispo", "ratio_cap": 3.0})
    loss = {"name": "dppo_binary_tv", "ratio_cap": math.inf, "delta_low": 0.15}
    write_rewards(tmp_path / "tv", {0: 0.5}, seed=1, loss=loss, stop=(1, 2), unset=None, wrong=math.nan)
    rows = hparams_table(tmp_path, sort_by="loss.ratio_cap")
    assert [row.name for row in rows] == ["cispo/tb", "tv/tb"]
    for row, reward in zip(rows, (0.75, 0.5), strict=True):
        assert [(m.name.tag, m.value) for m in row.metric_values] == [("reward/mean", reward)]
        assert [session.status for session in row.sessions] == [api_pb2.STATUS_SUCCESS]
    values = {k: getattr(v, v.WhichOneof("kind")) for k, v in rows[1].hparams.items()}
    assert values == {
        "seed": 1, "loss.name": "dppo_binary_tv", "loss.ratio_cap": sys.float_info.max, "loss.delta_low": 0.15,
        "stop": "[1, 2]",
    }  # fmt: skip
    alone = hparams_table(tmp_path / "cispo", sort_by="seed")
    assert [(row.name, row.metric_values[0].value) for row in alone] == [("tb", 0.75)]


def test_a_run_that_failed_is_not_marked_as_finished(tmp_path):
    with pytest.raises(RuntimeError), open_log(tmp_path, seed=0) as log:
        log.scalars(0, {"reward/mean": 0.5})
        raise RuntimeError
    (row,) = hparams_table(tmp_path, sort_by="seed")
    assert [session.status for session in row.sessions] == [api_pb2.STATUS_UNKNOWN]


# --- layout ---


def custom_scalars(logdir: Path) -> CustomScalarsPlugin:
    """What serves the Custom Scalars tab."""
    plugins: dict = {}
    provider = MultiplexerDataProvider(multiplexer(logdir), str(logdir))
    context = base_plugin.TBContext(data_provider=provider, plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(context)
    return CustomScalarsPlugin(context)


def test_the_custom_scalars_tab_groups_the_panels(tmp_path):
    """Two runs, one of them resumed, share one layout; each chart finds the tags of its panel and no other."""
    tags = [tag for panel in PANELS for tag in panel.tags] + ["eval/AIME 24/avg", "eval/sums/avg"]
    others = ["eval/sums/pass@2", "eval/sums/avg/more", "ratio/max", "grad_norm/more", "policy/entropy_max"]
    for name in ("a", "b"):
        with open_log(tmp_path / name) as log:
            log.scalars(0, dict.fromkeys([*tags, *others], 0.5))
    write_rewards(tmp_path / "b", {1: 0.5}, resume_step=1)
    plugin = custom_scalars(tmp_path)
    shown = plugin.layout_impl(RequestContext(), "")
    shown = {group["title"]: group["chart"] for group in json.loads(shown)["category"]}
    assert list(shown) == ["Learning", "Trust region", "Policy"]
    charts = {chart["title"]: chart["multiline"]["tag"] for group in shown.values() for chart in group}
    assert len(charts) == sum(map(len, shown.values())) == len(PANELS) + 1  # the evaluations have one together

    def found(title: str) -> set[str]:
        answers = [plugin.scalars_impl(RequestContext(), "b/tb", tag, "") for tag in charts[title]]
        assert all(answer["regex_valid"] for answer in answers)
        return {tag for answer in answers for tag in answer["tag_to_events"]}

    for panel in PANELS:
        assert found(panel.title) == set(panel.tags)
    assert found("Evaluations") == {"eval/AIME 24/avg", "eval/sums/avg"}
    reader = EventAccumulator(str(tmp_path / "b" / "tb"), KEEP_ALL).Reload()
    assert [event.step for event in reader.Tensors("custom_scalars__config__")] == [0]


# --- progress ---


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path, capfd):
    with RunLog(tmp_path, hparams={}, resume_step=2, total_steps=9, plain_every=4) as log:
        for step in range(2, 9):
            log.progress(step, {"reward/mean": 0.5, "trust_region/masked": 0.01})
        log.note("done")
    out, err = capfd.readouterr()
    *lines, last = err.splitlines()
    assert out == "" and last == "done"
    assert [line.split("  ")[:3] for line in lines] == [
        [f"step {n}/9", "reward 0.500", "masked 0.010"] for n in (4, 8, 9)
    ]
    assert all(line.endswith(" s/step") for line in lines)


def test_on_a_terminal_progress_is_one_line_that_is_redrawn(tmp_path, monkeypatch):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with open_log(tmp_path, resume_step=2, total_steps=4) as log:
            log.progress(2, {"reward/mean": 0.25})
            log.progress(3, {"reward/mean": 0.5})
        terminal.flush()
        screen = os.read(leader, 65536).decode()
    os.close(leader)
    assert "3/4" in screen and "reward 0.500" in screen and "s/step" in screen
    assert screen.count("\n") == 1 and screen.endswith("\n")


# --- reading ---


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere' does not exist"):
        read_scalars(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file' is a file; give the folder that a run was written to$"):
        read_scalars(tmp_path / "file")
    with pytest.raises(UserError, match="holds no TensorBoard event file$"):
        read_scalars(tmp_path)
    open_log(tmp_path / "child").close()
    with pytest.raises(UserError, match="its subfolders do: child"):
        read_scalars(tmp_path)
    with pytest.raises(UserError, match="hold no scalars"):
        read_scalars(tmp_path / "child")
    event_files(tmp_path / "child")[0].write_bytes(b"not an event file, whatever its name says")
    with pytest.raises(UserError, match="hold no scalars"):
        read_scalars(tmp_path / "child")


def test_a_file_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        open_log(tmp_path / "run")


def test_the_closing_table_compares_first_and_last_steps(tmp_path):
    rewards = [0.0, 1.0, 2.0, 3.0, 4.0, math.nan, 10.0, 20.0, 30.0, 40.0, 50.0]
    steps = np.arange(len(rewards))
    first, last = first_and_last({"reward/mean": (steps, np.array(rewards)), "dead": (steps, steps * math.nan)})
    assert (first, last) == ({"reward/mean": 2.0}, {"reward/mean": 30.0})
    lines = final_table(first, last, "runs/a b").splitlines()
    assert lines[0].split("  ")[-1].strip() == "last 5 steps"
    assert lines[1].split() == ["reward/mean", "2", "30"]
    assert lines[2].split() == ["policy/entropy", "-", "-"]
    assert lines[-2] == "logs: runs/a b" and lines[-1].endswith("--logdir 'runs/a b'")
    write_rewards(tmp_path, {0: 0.25, 1: 0.75})
    assert summary_table(tmp_path).splitlines()[1].split() == ["reward/mean", "0.5", "0.5"]
