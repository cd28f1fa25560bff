"""What is kept of labels between loads: it is used, never trusted where it is damaged, and writers do not clash."""

import json
import subprocess
import sys
import time

import pytest

from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards import label_cache, labels
from dppo_jax.rewards.label_cache import LabelCache, key
from dppo_jax.rewards.labels import answer_faults
from tests.helpers.places import ROOT

LABELS = ["\\frac{1}{2}", "x+1", "\\begin{cases}x=1\\\\y=2\\end{cases}", "7", "2\\sqrt{3}", "2\\sqrt{5}"]
BAD = 2  # the label that math-verify cannot read


def faults(folder):
    return answer_faults("math_verify", LABELS, cache=str(folder))


def test_findings_are_kept_and_used(tmp_path):
    folder = tmp_path / "new" / "labels"
    first = faults(folder)
    assert [fault is None for fault in first] == [n != BAD for n in range(len(LABELS))]
    (file,) = folder.iterdir()
    cache = LabelCache(str(folder), "math_verify")
    found = cache.read()
    assert found == {key(text): "good" if n != BAD else "unread" for n, text in enumerate(LABELS) if text != "7"}
    assert faults(folder) == first == answer_faults("math_verify", LABELS)
    # What the file says is what is said, so nothing was read again; another label is, and is added.
    cache.add({key("x+1"): "unequal"})
    assert faults(folder)[1].startswith("is not equal to itself")
    assert answer_faults("math_verify", ["x+2", "x+1"], cache=str(folder))[0] is None
    assert cache.read() == {**found, key("x+1"): "unequal", key("x+2"): "good"} and list(folder.iterdir()) == [file]


def test_a_load_keeps_them_too_and_an_empty_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a", "answer": text}) for text in LABELS))
    for folder, files in (("", 0), ("~/labels", 1)):
        with pytest.raises(UserError, match="row 3: the answer .* holds no mathematics"):
            load_task("jsonl", path=str(rows), verifier="math_verify", label_cache=folder)
        task = load_task("jsonl", path=str(rows), verifier="math_verify", label_cache=folder, bad_label="drop")
        assert len(task.examples) == len(LABELS) - 1
        assert len(list(tmp_path.glob("labels/*"))) == files


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-7],
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"unread", b"good  "),
        lambda content: content.replace(b"good", b"unread"),
        lambda content: content + b"more\n",
        lambda content: b"\xff\xfe" + content,
        lambda content: b"\0" * len(content),
        lambda content: content[65:],
    ],
)
def test_a_damaged_file_counts_as_none_and_is_written_anew(tmp_path, damage):
    right = faults(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert LabelCache(str(tmp_path), "math_verify").read() == {}
    assert faults(tmp_path) == right
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_lines_that_mean_nothing_are_passed_over(tmp_path):
    cache = LabelCache(str(tmp_path), "math_verify")
    cache.add({key("x+1"): "perfect", key("x+2"): "good"})
    assert answer_faults("math_verify", ["x+1", "x+2"], cache=str(tmp_path)) == [None, None]
    assert cache.read() == {key("x+1"): "good", key("x+2"): "good"}


def test_a_label_that_hung_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "TIME_LIMIT_S", 2.0)
    found = answer_faults("math_verify", ["9^{9^{9^9}}", "\\frac12"], cache=str(tmp_path))
    assert found[0].startswith("takes math-verify more than 2 seconds") and found[1] is None
    assert LabelCache(str(tmp_path), "math_verify").read() == {key("\\frac12"): "good"}


def test_another_version_of_what_reads_has_a_file_of_its_own(tmp_path, monkeypatch):
    LabelCache(str(tmp_path), "math_verify").add({"0" * 32: "good"})
    for name, value in (("LIBRARIES", ("sympy",)), ("READERS", ("maths",))):
        with monkeypatch.context() as patch:
            patch.setattr(label_cache, name, value)
            label_cache._readers.cache_clear()
            assert LabelCache(str(tmp_path), "math_verify").read() == {}
        label_cache._readers.cache_clear()
    assert LabelCache(str(tmp_path), "other").read() == {}
    assert LabelCache(str(tmp_path), "math_verify").read() == {"0" * 32: "good"}


def test_a_file_that_grew_too_long_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(label_cache, "MOST", 3)
    cache = LabelCache(str(tmp_path), "math_verify")
    cache.add({key(str(n)): "good" for n in range(3)})
    cache.add({key("3"): "good"})
    assert cache.read() == {key("3"): "good"}


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/dev/null/x", "cannot make the folder '/dev/null/x': Not a directory"),
        ("~no_such_user/x", "no home folder is known for ~"),
        ("/proc/dppo_jax", "cannot make the folder '/proc/dppo_jax'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_and_no_reason_to_stop(capfd, folder, reason):
    assert [fault is None for fault in faults(folder)] == [n != BAD for n in range(len(LABELS))]
    said = capfd.readouterr().err
    assert said.startswith("label_cache: ") and said.count("\n") == 1 and reason in said
    assert said.endswith("; what is found of labels is not kept for later runs\n")


WRITER = """
import sys
from dppo_jax.rewards.label_cache import LabelCache, key
folder, name = sys.argv[1:]
cache = LabelCache(folder, "math_verify")
for n in range(40):
    cache.add({key(f"{name} {n} {i}"): "good" for i in range(50)})
"""


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path):
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), name] for name in "abc"]
    writers = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    cache, seen = LabelCache(str(tmp_path), "math_verify"), 0
    while any(writer.poll() is None for writer in writers):
        found = cache.read()
        assert found or not seen  # what is there once is never seen in part
        assert all(finding == "good" for finding in found.values())
        seen = max(seen, len(found))
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1
    found = cache.read()
    assert any(all(key(f"{name} {n} {i}") in found for n in (39,) for i in range(50)) for name in "abc")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x^{2}-31x+4", "x^{9}-52x+7", True),
        ("\\frac{3+\\sqrt{2}}{7}", "\\frac{8+\\sqrt{5}}{2}", True),
        ("\\frac{\\frac{1}{2}+3}{5}", "\\frac{\\frac{4}{7}+8}{6}", True),
        ("\\frac{1}{5-5}", "\\frac{1}{5-4}", False),  # one of them is no number
        ("1/(5-5)", "1/(5-4)", False),
        ("\\frac{1}{5}", "\\frac{1}{0}", False),
        ("9^{9^{9}}", "1^{1^{1}}", False),  # one of them takes all the memory
        ("9^9^9", "1^1^1", False),
        ("(9^{99})^{99}", "(1^{11})^{11}", False),
        ("9^{999}", "1^{111}", False),
        ("99!", "11!", False),
    ],
)
def test_labels_that_differ_in_digits_are_read_once_where_digits_make_no_difference(one, other, same):
    assert (labels._shape(one) == labels._shape(other)) is same
