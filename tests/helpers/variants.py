"""The golden models of tests/golden/models/variants.json: the weights of a family under another config."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
VARIANTS: dict[str, dict[str, Any]] = json.loads((MODELS / "variants.json").read_text())


def write_variant(name: str, folder: Path, **changes: Any) -> Path:
    """Its model directory, in a folder that is there, with further changes of the config."""
    source = MODELS / VARIANTS[name]["family"]
    fields = json.loads((source / "config.json").read_text()) | VARIANTS[name]["changes"] | changes
    fields = {key: value for key, value in fields.items() if value is not None or key == "sliding_window"}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder
