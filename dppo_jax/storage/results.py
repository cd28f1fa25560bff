"""The samples of an evaluation in a parquet file, a row each, written batch by batch.

Until all batches are there they lie beside it, in FILE.parts, each whole or not at all: what was killed goes on with
those that are missing. The file's metadata say what it is a function of.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dppo_jax.errors import UserError, first_line, writing
from dppo_jax.files import Path, is_file, make_folder, read_json_object, remove_tree, write_text, written_whole

ABOUT = b"dppo_jax"  # the key of the file's metadata, a JSON object
WRITTEN: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
SCHEMA = pyarrow.schema(
    {
        "set": pyarrow.string(),  # of eval.sets
        "question": pyarrow.int32(),  # its number in the set, from 0
        "sample": pyarrow.int32(),  # the reply's number among the question's, from 0
        "prompt": pyarrow.string(),  # messages as JSON
        "answers": pyarrow.list_(pyarrow.string()),  # gold ones
        "reply": pyarrow.string(),
        "extracted": pyarrow.string(),  # the answer that the reply gives; null where it gives none
        "reward": pyarrow.float32(),
        "length": pyarrow.int32(),  # tokens of the response
        "truncated": pyarrow.bool_(),  # ended by the limit on its length
        "outcome": pyarrow.string(),  # of the verifier: scored | killed | failed | refused
    }
)


class ResultsFile:
    """FILE.parquet, and FILE.parquet.parts until it is there. One process at a time writes."""

    def __init__(self, path: Path):
        self.path, self.parts = path, path.with_name(f"{path.name}.parts")

    def about(self) -> dict[str, Any] | None:
        """What the file, or the parts of one, are a function of; None where there is neither. UserError for a file
        that holds something else."""
        if is_file(self.path):
            return about_of(self.path)
        path = self.parts / "about.json"
        return read_json_object(path) if is_file(path) else None

    def begin(self, about: Mapping[str, Any]) -> None:
        """Makes the folder of parts, where there is none."""
        make_folder(self.parts)
        with writing(self.parts):
            write_text(self.parts / "about.json", json.dumps(about, indent=2, allow_nan=False) + "\n")

    @property
    def whole(self) -> bool:
        """Whether the file is there, with all samples."""
        return is_file(self.path)

    def batches(self, name: str, rows: int) -> dict[int, pyarrow.Table]:
        """The batches of a set that are there, by number; of the whole file all, of `rows` rows each."""
        if self.whole:
            table = read_table(self.path)
            table = table.filter(pyarrow.compute.equal(table["set"], name))
            return {number: table.slice(number * rows, rows) for number in range(-(-table.num_rows // rows))}
        return {int(path.stem.rpartition("-")[2]): read_table(path) for path in self._parts_of(name)}

    def add(self, name: str, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes one batch of a set, whole or not at all. WriteError."""
        table = pyarrow.table({key: columns[key] for key in SCHEMA.names}, schema=SCHEMA)
        with writing(self.parts):
            write_table(self.parts / f"{name}-{number:06}.parquet", table)

    def finish(self, about: Mapping[str, Any], names: Sequence[str]) -> None:
        """Makes the file of the parts of these sets, in their order, and removes those. WriteError."""
        schema = SCHEMA.with_metadata({ABOUT: json.dumps(about, allow_nan=False)})
        with writing(self.path), written_whole(self.path) as partial:
            with pyarrow.parquet.ParquetWriter(partial, schema, **WRITTEN) as writer:
                for path in (path for name in names for path in self._parts_of(name)):
                    writer.write_table(read_table(path).replace_schema_metadata(schema.metadata))
        with contextlib.suppress(OSError):
            remove_tree(self.parts)

    def _parts_of(self, name: str) -> list[Path]:
        found = [path for path in self.parts.glob("*.parquet") if path.stem.rpartition("-")[0] == name]
        return sorted(found)


def write_table(path: Path, table: pyarrow.Table) -> None:
    """Writes a parquet file whole or not at all. OSError."""
    with written_whole(path) as partial:
        pyarrow.parquet.write_table(table, partial, **WRITTEN)


def read_table(path: Path) -> pyarrow.Table:
    """The whole of a parquet file, its checksums verified. UserError."""
    try:
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as file:
            return file.read()
    except Exception as error:  # a damaged file may make the library raise errors of any class
        raise UserError(
            f"{path} cannot be read as parquet: {first_line(error):.200}; delete it, and what it held is drawn again"
        ) from None


def about_of(path: Path) -> dict[str, Any]:
    """What a parquet file of ours says that it is a function of. UserError for another file."""
    try:
        with path.open("rb") as opened:
            metadata = pyarrow.parquet.read_schema(opened).metadata or {}
        about = json.loads(metadata[ABOUT])
    except Exception:
        raise UserError(f"{path} is there and is no file of this command: name another") from None
    return about
