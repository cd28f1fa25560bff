"""What a run leaves, in buckets of real servers on this machine: gs:// and s3://."""

import os
import signal
import subprocess
import sys
import uuid

import pytest

from dppo_jax import files
from dppo_jax.errors import UserError, of_bucket
from dppo_jax.files import filesystem, to_path, user_path
from dppo_jax.storage import lock
from dppo_jax.storage.checkpoint import Checkpoints, restore_params
from dppo_jax.storage.lock import locked
from tests.helpers.bucket_servers import BUCKET, in_environment, serving
from tests.helpers.places import ROOT
from tests.storage.test_checkpoint import abstract, equal, resumed, state


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def server(request):
    with serving(request.param) as environment, in_environment(environment):
        to_path(f"{request.param}://{BUCKET}")
        yield request.param


@pytest.fixture
def folder(server):
    """A folder of a bucket, in which nothing is yet."""
    return user_path(f"{server}://{BUCKET}/{uuid.uuid4().hex}", "--workdir")


def test_files_are_written_whole_read_moved_and_removed(folder, tmp_path):
    assert files.names_in(folder) == [] and not folder.exists()
    files.write_text(folder / "a" / "one.txt", "eins")
    files.write_text(folder / "a" / "deep" / "two.json", '{"zwei": 2}')
    assert files.names_in(folder) == ["a"] and files.names_in(folder / "a") == ["deep", "one.txt"]
    assert files.is_file(folder / "a" / "one.txt") and not files.is_file(folder / "a")
    assert files.read_json_object(folder / "a" / "deep" / "two.json") == {"zwei": 2}
    assert files.size_of(folder / "a" / "one.txt") == 4
    assert files.read_ranges(folder / "a" / "one.txt", [0, 2], 2) == [b"ei", b"ns"]
    files.move_tree(folder / "a", folder / "b")
    found = files.files_in(folder)
    assert [str(path.relative_to(folder)) for path in found] == ["b/deep/two.json", "b/one.txt"]
    with files.local_folder(folder, without="*.json") as local:
        assert [path.relative_to(local).as_posix() for path in files.files_in(local)] == ["b/one.txt"]
    files.remove_tree(folder)
    assert not folder.exists() and files.files_in(folder) == []


def test_another_process_sees_at_once_what_is_written(folder):
    code = f"from dppo_jax.files import *; write_text(to_path('{folder}/new.txt'), 'x')"
    assert files.names_in(folder) == []
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert files.names_in(folder) == ["new.txt"]


def test_checkpoints_are_kept_restored_and_deleted_as_on_a_disk(folder):
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, state(step), {"step": step})
    assert files.names_in(folder / "checkpoints") == ["4", "6"]
    found = resumed(folder)
    assert (found.step, found.notes) == (6, [])
    equal(found.state, state(6))
    params = restore_params(folder, abstract()["params"])
    equal(params, state(6)["params"])
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.newest_whole().step == 6 and checkpoints.about(4) == {"step": 4}


def test_a_step_that_was_begun_and_not_finished_is_no_checkpoint(folder):
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, state(step))
    for step, last in ((4, "manifest.json"), (6, "commit_success.txt")):  # a kill came before
        (folder / "checkpoints" / str(step) / last).unlink()
    found = resumed(folder)
    assert (found.step, found.notes) == (2, [])
    equal(found.state, state(2))
    with Checkpoints(folder, keep=5) as checkpoints:
        assert checkpoints.newest_whole().step == 2
        checkpoints.save(4, state(40))
    assert files.names_in(folder / "checkpoints") == ["2", "4"]
    equal(resumed(folder).state, state(40))


@pytest.mark.parametrize("how", ["other bytes", "shorter", "gone", "too many"])
def test_a_damaged_step_is_set_aside(folder, how):
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state(step))
    largest = max(files.files_in(folder / "checkpoints" / "4"), key=files.size_of)
    content = largest.read_bytes()
    if how == "gone":
        largest.unlink()
    elif how == "too many":
        (folder / "checkpoints" / "4" / "default" / "array_metadatas" / "process_0~").write_text("x")
    else:
        largest.write_bytes(bytes([content[0] ^ 1]) + content[1:] if how == "other bytes" else content[:-1])
    found = resumed(folder)
    assert found.step == 2 and "checkpoint 4 is damaged (checkpoints/4/" in found.notes[0]
    equal(found.state, state(2))
    assert files.names_in(folder / "damaged_checkpoints") == ["4"] and files.names_in(folder / "checkpoints") == ["2"]


HOLDER = """
import sys
import time

from dppo_jax.files import to_path
from dppo_jax.storage import lock
from dppo_jax.storage.lock import locked

lock.BUCKET_BEAT_S = 0.5
with locked(to_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def holder(folder) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_folder_in_use_is_refused_and_taken_over_when_its_process_is_gone(folder, monkeypatch):
    monkeypatch.setattr(lock, "WATCH_S", 40.0)
    with holder(folder) as process:
        with pytest.raises(UserError, match=f"is in use by another run, process {process.pid} on "), locked(folder):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    monkeypatch.setattr(lock, "WATCH_S", 1e9)  # nobody is watched
    with locked(folder):
        assert lock._read(folder / lock.NAME)["process"] == os.getpid()
    assert not (folder / lock.NAME).exists()


def test_a_lock_of_another_machine_is_watched_before_it_is_taken(folder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WATCH_S", 1.0)
    files.write_text(folder / lock.NAME, '{"host": "elsewhere", "process": 1, "started": "2026", "beat": 3}')
    with locked(folder):
        assert lock._read(folder / lock.NAME)["process"] == os.getpid()
    assert "was left by a run process 1 on elsewhere" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_is_named(server):
    address = f"{server}://nobody-has-this-bucket"
    with pytest.raises(UserError, match=f"--workdir = '{address}/run': there is no bucket {address}$"):
        user_path(f"{address}/run", "--workdir")
    with pytest.raises(UserError, match="cannot be written to"):
        Checkpoints(to_path(f"{address}/run"), keep=1)


def test_only_what_comes_out_of_a_client_is_said_to_be_of_a_bucket(server):
    address = f"{server}://nobody-has-this-bucket/x"
    for fails in (lambda: filesystem(to_path(address)).info(address), other):
        with pytest.raises(OSError) as error:
            fails()
        assert error.value.errno is None and of_bucket(error.value) == (fails is not other)


def other():
    """What libraries raise who have nothing to do with buckets."""
    raise OSError("Can't load the tokenizer")


def test_a_file_is_no_folder(folder):
    files.write_text(folder / "file", "x")
    with pytest.raises(UserError, match="cannot make the folder '.*/file': a file has the name"):
        files.make_folder(folder / "file")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gs:/bucket/x", "must have two slashes: write gs://bucket/x"),
        ("s3:///bucket/x", "must have two slashes: write s3://bucket/x"),
        ("gs://bucket/a#1/x", "has # in it, which clients of buckets do not take as it stands"),
        ("s3://bucket/a*/x", "has * in it"),
        ("gs://", "names no bucket: write gs://BUCKET/NAME"),
        ("s3://bucket//x", "has an empty name"),
        ("gs://bucket/../x", "has an empty name, . or .. in it"),
        ("hdfs://node/x", "hdfs:// addresses are neither read nor written; gs:// and s3:// are"),
    ],
)
def test_an_address_that_names_nothing_is_refused(text, sentence):
    with pytest.raises(UserError) as error:
        user_path(text, "--workdir")
    assert str(error.value).startswith(f"--workdir = {text!r}") and sentence in str(error.value)


def test_a_client_that_is_not_installed_is_named(monkeypatch):
    files._prepare.cache_clear()
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"s3:// addresses need the package s3fs.*s3fs \(or dppo_jax\[s3\]\)"):
        to_path("s3://bucket/x")
    files._prepare.cache_clear()

