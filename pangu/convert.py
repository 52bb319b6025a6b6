"""Convert PanGu-α weights from any format into another.

    python tools/convert_checkpoint.py --from auto --to huggingface --input PanguAlpha_2.6B_fp16.ckpt --output weights/2.6B
    python tools/convert_checkpoint.py --from auto --to megatron --tensor-parallel 8 --input weights/2.6B --output megatron/2.6B
    python tools/convert_checkpoint.py --from deepspeed --to mindspore --input runs/mine/checkpoints --output mine.ckpt

It needs memory for the largest tensor, not for the model. The output appears only when it is complete.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pangu.errors import exit_code, one_line


@exit_code
def main() -> None:
    """Parse the command line and convert."""
    # torch then asks for huge pages, of which a tensor that is read, written and dropped takes hundreds of times fewer.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from pangu.config.activations import ACTIVATIONS
    from pangu.config.sizes import num_parameters
    from pangu.conversion.convert import convert
    from pangu.conversion.formats import FORMATS, detect_format, open_weights
    from pangu.conversion.weights import Overrides, WriteOptions

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--from", dest="source", default="auto", choices=["auto", *FORMATS], help="input format (default: detected from the files)"
    )
    parser.add_argument("--to", required=True, choices=[name for name, known in FORMATS.items() if known.write])
    parser.add_argument("--input", required=True, type=Path, metavar="PATH")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="number of files that a megatron output is split into")
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the output (default: each tensor's own)")
    parser.add_argument("--heads", type=int, metavar="N", help="number of attention heads, for sizes that were never published")
    parser.add_argument("--gelu", choices=ACTIVATIONS, help="activation function, if not the one that the format implies")
    parser.add_argument(
        "--final-norm",
        choices=["before_query", "after_query"],
        help="position of the final LayerNorm, if not the one that the format implies",
    )
    parser.add_argument(
        "--with-optimizer",
        action="store_true",
        help="also convert Adam's states and fp32 weights: from deepspeed or mindspore to mindspore",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    arguments = parser.parse_args()

    source = detect_format(arguments.input) if arguments.source == "auto" else arguments.source
    weights = open_weights(arguments.input, Overrides(arguments.heads, arguments.gelu, arguments.final_norm), format_name=source)
    model = weights.config
    print(f"{arguments.input}: {weights.source}")
    print(
        f"{num_parameters(model):,} parameters in {len(weights.tensors)} tensors: {model.num_layers} layers (query layer included), "
        f"hidden {model.hidden_size}, heads {model.num_heads}, vocabulary {model.vocab_size}, positions {model.max_positions}, "
        f"gelu {model.gelu}, final norm {model.final_norm}"
    )
    if weights.left_out and not arguments.with_optimizer:
        shown = ", ".join(weights.left_out[:3]) + (", ..." if len(weights.left_out) > 3 else "")
        print(one_line(f"left out, not being weights: {len(weights.left_out)} ({shown})"))
    if not FORMATS[arguments.to].says_gelu and model.gelu != "tanh":
        print(f"note: {arguments.to} cannot say which GELU the model has; give --gelu {model.gelu} whenever the output is read")
    if arguments.with_optimizer:
        weights = weights.with_optimizer()
    everything = [tensor for tensors in (weights.tensors, *weights.optimizer.values()) for tensor in tensors.values()]
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in everything)
    began = time.perf_counter()
    with Progress(TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), transient=True) as progress:
        task = progress.add_task("convert", total=total)
        options = WriteOptions(dtypes[arguments.dtype] if arguments.dtype else None, arguments.tensor_parallel)
        convert(weights, arguments.to, arguments.output, options, force=arguments.force, advance=lambda n: progress.advance(task, n))
    seconds = time.perf_counter() - began
    print(f"{arguments.output}: {arguments.to}, {total / 2**20:,.1f} MiB in {seconds:.1f} s ({total / 2**20 / seconds:,.0f} MiB/s)")


if __name__ == "__main__":
    main()
