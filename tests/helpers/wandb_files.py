"""What W&B wrote offline: its files are a log of records as LevelDB writes one, each a message of wandb's own."""

import struct
from collections.abc import Iterator
from pathlib import Path

HEAD, BLOCK, RECORD = 7, 32768, 7  # bytes of the file's head, of a block, of a record's head: crc, length, kind
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
