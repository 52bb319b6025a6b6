"""A table of published training runs, as pangu.planner.reference reads it."""

from __future__ import annotations

import csv
import io

from pangu.planner.reference import COLUMNS

RUN = {
    "id": "one",
    "family": "BLOOM sweep",
    "source": "a log (02-21)",
    "layers": "72",
    "hidden": "14336",
    "heads": "64",
    "vocab": "250880",
    "seq": "2048",
    "global_batch": "2048",
    "micro_batch": "4",
    "tp": "8",
    "pp": "12",
    "dp": "4",
    "zero": "1",
    "recompute": "full",
    "seqpar": "0",
    "precision": "bf16",
    "hardware": "A100-80",
    "n_devices": "384",
    "iter_s": "123.69",
    "mem_gb": "49",
}


def table(*changes: dict[str, str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows({**RUN, **change} for change in changes)
    return text.getvalue()
