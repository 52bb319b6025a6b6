"""Manifests of training checkpoints as somebody else would write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pangu.engine.manifest import MANIFEST


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's manifest. It is then of format 1, which has no hash of itself, so that what was changed is what is tested."""
    values = json.loads((folder / MANIFEST).read_text())
    values.pop("sha256", None)
    values["format"] = 1
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))
