"""Checkpoints in a bucket: what is there in place of a folder's rename, and of reading every byte again.

A bucket renames nothing: orbax writes a step under its name from the beginning, and a file that says so when it is
whole. Our manifest comes before that file, so that a step counts where both are there. And a bucket keeps a checksum of
every file that it holds, made when the file was written and checked by the bucket whenever it is read: the manifest
holds that one, and a look at the list of files tells whether one was replaced.

orbax knows gs:// alone; TensorStore, which writes the arrays, knows s3:// too. `teach_orbax_s3` brings them together.
"""

import functools
import os
from typing import Any

from dppo_jax.errors import UserError
from dppo_jax.files import Path, filesystem

COMMIT = "commit_success.txt"  # orbax's, the last file of a step
CHECKSUMS = ("crc32c", "ETag")  # of Google's and of Amazon's stores


def stored_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and the bucket's own checksum of every file in a folder, by its path from there on. OSError."""
    found = filesystem(folder).find(str(folder), detail=True)
    start = len(str(folder).partition("://")[2]) + 1
    return {name[start:]: (about["size"], _checksum(about)) for name, about in found.items()}


def _checksum(about: dict[str, Any]) -> str:
    kind = next((kind for kind in CHECKSUMS if about.get(kind)), "")
    return f"{kind}:{about.get(kind, '')}".replace('"', "")


@functools.cache
def teach_orbax_s3() -> None:
    """Has orbax write and read s3:// by TensorStore's driver, as it does gs:// by that of Google's store.

    The endpoint and the region are those of AWS_ENDPOINT_URL and AWS_REGION. UserError where orbax has changed inside.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        gs_store, is_store = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._use_gcs_driver
        normal, prefixes = tensorstore_utils._normalize_path, gcs_utils._GCS_PATH_PREFIX
    except AttributeError as error:
        raise UserError(f"checkpoints in s3:// need orbax-checkpoint as requirements/ locks it: {error}") from None

    def store(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return gs_store(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        where = {"endpoint": os.environ.get("AWS_ENDPOINT_URL"), "aws_region": region}
        return {"driver": "s3", "bucket": bucket, "path": key} | {name: value for name, value in where.items() if value}

    gcs_utils.get_kvstore_for_gcs = store
    gcs_utils._GCS_PATH_PREFIX = (*prefixes, "s3://")
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3://") or is_store(path)
    tensorstore_utils._normalize_path = lambda path: normal(path).replace("s3:/", "s3://")
