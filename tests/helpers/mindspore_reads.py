"""Whether MindSpore itself reads .ckpt files that were written here, and saves them again byte for byte.

    python tests/helpers/mindspore_reads.py FILE.ckpt...        with a Python that has mindspore installed, and nothing of this project

Not a test of the suite: MindSpore wants an environment of its own.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

import mindspore

for path in sys.argv[1:]:
    tensors = mindspore.load_checkpoint(path)
    with tempfile.TemporaryDirectory() as folder:
        again = str(Path(folder) / "again.ckpt")
        mindspore.save_checkpoint([{"name": name, "data": tensor} for name, tensor in tensors.items()], again)
        same = filecmp.cmp(path, again, shallow=False)
    print(f"{path}: MindSpore {mindspore.__version__} reads {len(tensors)} tensors and saves {'the same bytes' if same else 'OTHER BYTES'}")
    if not same:
        sys.exit(1)
