"""What W&B wrote offline: its files are a log of records as LevelDB writes one, each a message of wandb's own."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEAD, BLOCK, RECORD = 7, 32768, 7  # bytes of the file's head, of a block, of a record's head: crc, length, kind
TIME_LIMIT_S = 60
FIRST, MIDDLE = 2, 3  # kinds of a piece that another follows; 1 is whole, 4 the last


def records(file: Path) -> Iterator:
    """The messages of a .wandb file; a record that a kill cut short ends it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), HEAD, b""
    assert data.startswith(b":W&B")
    while at + RECORD <= len(data):
        if BLOCK - at % BLOCK < RECORD:  # nothing begins there
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + RECORD + length > len(data):
            return
        parts += data[at + RECORD : at + RECORD + length]
        at += RECORD + length
        if kind not in (FIRST, MIDDLE):
            yield Record.FromString(parts)
            parts = b""


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The package in its offline mode, with what it keeps beside runs in the folder."""
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(folder / "elsewhere"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def processes(folder: Path) -> list[list]:
    """The records of every process that wrote a run, in their order; W&B's own process may be late with the last."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    end = time.monotonic() + TIME_LIMIT_S
    while True:
        found = [list(records(file)) for file in files]
        if all(of_kind(own, "exit") for own in found) or time.monotonic() > end:
            return found
        time.sleep(0.05)


def of_kind(found: list, kind: str) -> list:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def rows(found: list) -> list[dict[str, Any]]:
    """The rows of the history, {key: value}."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        for history in of_kind(found, "history")
    ]
