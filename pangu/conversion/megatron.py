"""Weights of the PyTorch port that was published with PanGu-α: Megatron-LM 1.1 checkpoints, one file per tensor-parallel rank.

    DIR/latest_checkpointed_iteration.txt                       1000, or "release"
    DIR/iter_0001000/mp_rank_00/model_optim_rng.pt              model, iteration, and further training state

The writer writes what the port's loader needs: `model` and `iteration`. Its `--num-layers` does not count the query layer. It sets up
training anew from these files with `--finetune` (there is no optimizer in them), and its activation is erf GELU unless it is given
`--openai-gelu`.

The vocabulary is padded to a multiple of the number of files, as the port's default `--make-vocab-size-divisible-by 1` has it. Its older
version padded to a multiple of 128 per rank; give it that flag, since it refuses another size, while the newer one would cut each rank's
larger table to size and shift the ids of all ranks but the first.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pangu.config import ModelConfig
from pangu.config.activations import ACTIVATIONS
from pangu.conversion.weights import VOCAB_SIZE, Overrides, Weights, WriteOptions, complete, model_specs
from pangu.errors import InputError
from pangu.files import open_file
from pangu.tensor_files.lazy_tensor import LazyTensor, merged
from pangu.tensor_files.torch_file import Planned, StoredTensor, TorchFileWriter, is_torch_file, load
from pangu.tensor_files.torch_pickle import Opaque
from pangu.text.tokenizer import copy_model

TRACKER, FILE, TOKENIZER = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "vocab.model"
WRITTEN_NAMES = r"latest_checkpointed_iteration\.txt|(iter_\d+|release)/mp_rank_\d+/model_optim_rng\.pt|vocab\.model"
DIALECT = "pangu_alpha"
"""A key that this project adds beside the model, for what the port has no field for. The port ignores it."""
_MARKED = ("vocab_size", "num_heads", "gelu", "final_norm", "separator_id", "pad_id")

_GLOBAL = {
    "transformer.wte": ("embedding", "word_embeddings"),
    "transformer.wpe": ("embedding", "position_embeddings"),
    "transformer.wqe": ("topQueryEmbedding", "top_query_embeddings"),
    "transformer.ln_f": ("transformer", "final_layernorm"),
}
_IN_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.q_proj": "attention.query",
    "attn.k_proj": "attention.key",
    "attn.v_proj": "attention.value",
    "attn.c_proj": "attention.dense",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
}
_RANK = re.compile(r"mp_rank_(\d{2,4})")
_ITERATION = re.compile(r"iter_(\d{7,12})|release")


# --- reading -----------------------------------------------------------------------------------------------------------------------------


def detect(path: Path) -> bool:
    """Whether a path is a Megatron checkpoint: the directory with the tracker, one of its iterations, or a file of torch.save."""
    if path.is_file():
        return path.suffix in (".pt", ".pth") and is_torch_file(path)
    if not path.is_dir():
        return False
    if (path / TRACKER).is_file() or _RANK.fullmatch(path.name):
        return True
    entries = [entry for entry in path.iterdir() if entry.is_dir()]
    return any(_RANK.fullmatch(entry.name) or (_ITERATION.fullmatch(entry.name) and (entry / "mp_rank_00").is_dir()) for entry in entries)


def read(path: Path, overrides: Overrides) -> Weights:
    """The weights of a checkpoint, from any number of tensor-parallel files.

    Args:
        path: the directory with the tracker file, an iteration's directory, or one of its files.
        overrides: the user's settings. By default the GELU is that of the file: our own key, or the arguments of the run that saved it.
            Files made by a converter contain neither; they hold the released weights, which were trained with tanh GELU.

    Raises:
        InputError: naming the file and tensor that is missing, damaged or disagrees with another.
    """
    files = _slice_files(path)
    roots = [_load(file) for file in files]
    steps = {_step(root) for root in roots}
    if len(steps) > 1:
        overrides.report(path, [f"its files are of different iterations: {', '.join(sorted(map(str, steps)))}"], ".")
    slices = [_flatten(file, root["model"]["language_model"]) for file, root in zip(files, roots, strict=True)]
    for file, stored in zip(files, slices, strict=True):
        different = sorted(stored.keys() ^ slices[0].keys())
        overrides.report(file, [f"{name} is either there or in {files[0]}, not in both" for name in different], ".")
    described, told = _described(roots[0])
    tensors: dict[str, LazyTensor] = {}
    names, num_layers = _canonical_names(path, slices[0], overrides)
    for canonical, name in names.items():
        split_dim = _split_dims().get(re.sub(r"\.h\.\d+\.", ".h.0.", canonical))
        pieces = [stored[name] for stored in slices if name in stored]
        shape = _full_shape(files, name, pieces, split_dim, overrides)
        if shape is None:
            continue
        if split_dim is not None and split_dim >= len(shape):
            split_dim = None  # of a wrong shape, which `complete` says
        if canonical == "transformer.wte.weight" and shape:
            rows = _vocab_size(path, shape[0], len(files), roots[0], described)
            if rows != shape[0]:
                told = f"word embedding cut from {shape[0]} padded rows to {rows}, {told}"
            shape = (rows, *shape[1:])
        tensors[canonical] = merged([LazyTensor(piece.shape, piece.dtype, piece.read) for piece in pieces], split_dim, shape)
    above = list(files[0].parents)[1:3] if _RANK.fullmatch(files[0].parent.name) else []
    beside = [folder / TOKENIZER for folder in (path if path.is_dir() else path.parent, *above)]
    return complete(
        path,
        tensors,
        overrides,
        source=f"Megatron checkpoint of the published PyTorch port, {len(files)} file{'s' if len(files) > 1 else ''}, {told}",
        num_layers=num_layers,
        described=described,
        step=next(iter(steps)) if len(steps) == 1 else None,
        files=tuple(files),
        layout={"tensor": len(files)},
        left_out=tuple(sorted(key for key in roots[0] if type(key) is str and key not in ("model", "iteration", DIALECT))),
        tokenizer=next((file for file in beside if file.is_file()), None),
    )


def _slice_files(path: Path) -> list[Path]:
    """The files of all ranks, in rank order."""
    if path.is_file():
        if not _RANK.fullmatch(path.parent.name):
            return [path]
        folder = path.parent.parent
    elif _RANK.fullmatch(path.name):
        folder = path.parent
    else:
        folder = _iteration_folder(path)
    ranks = {int(match[1]): entry for entry in folder.iterdir() if (match := _RANK.fullmatch(entry.name)) and entry.is_dir()}
    if not ranks:
        raise InputError(f"{folder}: no mp_rank_00; expected the directory of one iteration, with {FILE} in mp_rank_00, mp_rank_01, ...")
    absent = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if absent is not None:
        raise InputError(f"{folder}: mp_rank_{absent:02d} is missing, but mp_rank_{max(ranks):02d} is there. Copy the whole directory.")
    files = []
    for rank in range(len(ranks)):
        found = [file for file in (ranks[rank] / FILE, (ranks[rank] / FILE).with_suffix(".pth")) if file.is_file()]
        if len(found) != 1:
            raise InputError(f"{ranks[rank]}: holds {len(found)} files named {FILE} or .pth, expected 1.")
        files.append(found[0])
    return files


def _iteration_folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: not found.")
    entries = [entry for entry in path.iterdir() if entry.is_dir()]
    if any(_RANK.fullmatch(entry.name) for entry in entries):
        return path
    found = sorted(entry.name for entry in entries if _ITERATION.fullmatch(entry.name))
    if (path / TRACKER).is_file():
        with open_file(path / TRACKER) as file:
            text = file.read(64).decode("latin-1").strip()
        name = f"iter_{int(text):07d}" if re.fullmatch("[0-9]{1,12}", text) else text
        if name not in found:
            there = ", ".join(found[-3:]) or "no iteration"
            raise InputError(f"{path / TRACKER}: names {text!r}, but {there} is there. Give the directory of the iteration you want.")
        return path / name
    if len(found) != 1:
        raise InputError(f"{path}: no {TRACKER} and {len(found)} iterations; give the directory of the one you want.")
    return path / found[0]


def _load(file: Path) -> dict[Any, Any]:
    root = load(file)
    model = root.get("model") if isinstance(root, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("language_model"), dict):
        raise InputError(f"{file}: holds no model of the PyTorch port: expected model / language_model in it.")
    return root


def _step(root: dict[Any, Any]) -> int | None:
    """The training step: a number, or its directory's name as the port's splitter writes it."""
    value = root.get("iteration", root.get("total_iters"))
    if type(value) is str and (match := re.fullmatch(r"(?:iter_)?([0-9]{1,12})", value)):
        return int(match[1])
    return value if type(value) is int and 0 < value < 10**12 else None


def _flatten(file: Path, tree: dict[Any, Any]) -> dict[str, StoredTensor]:
    """The tensors of a nested model, names joined by dots: `transformer.layers.0.attention.query.weight`."""
    tensors: dict[str, StoredTensor] = {}
    pending: list[tuple[str, Any]] = [("", tree)]
    for name, value in pending:
        if isinstance(value, StoredTensor):
            if not value.dtype.is_floating_point:
                raise InputError(f"{file}: {name} is of type {value.dtype}, expected floating point.")
            tensors[name] = value
        elif isinstance(value, dict) and name.count(".") < 3 and all(type(key) is str for key in value):
            pending += [(f"{name}.{key}" if name else key, child) for key, child in value.items()]
        else:
            raise InputError(f"{file}: language_model has {name[:80]!r}, which is not a tensor.")
    return tensors


def _canonical_names(path: Path, stored: dict[str, StoredTensor], overrides: Overrides) -> tuple[dict[str, str], int]:
    """The stored name of each canonical tensor, and the number of layers; what has no canonical name keeps its own, to be refused as
    unknown.
    """
    blocks = {int(match[1]) for name in stored if (match := re.match(r"transformer\.layers\.(\d{1,4})\.", name))}
    absent = next((number for number in range(len(blocks)) if number not in blocks), None)
    if absent is not None and overrides.strict:
        raise InputError(f"{path}: lacks transformer.layers.{absent}, but has a layer {max(blocks)}.")
    if len(stored) < (16 if overrides.strict else 1) * len(blocks):
        raise InputError(f"{path}: has {len(blocks)} layers besides the query layer, but just {len(stored)} tensors.")
    num_layers = max(blocks, default=-1) + 2
    canonical = {".".join(theirs): ours for ours, theirs in _port_names(num_layers).items()}
    names: dict[str, str] = {}
    for name in stored:
        # PanGu-α Evolution renamed the query embedding; the port's loader takes either.
        usual = re.sub(r"^task_embedding\.", "topQueryEmbedding.", name)
        ours = canonical.get(usual, f"language_model.{name}"[:120])
        if ours in names:
            raise InputError(f"{path}: holds the query embedding twice, as {names[ours]} and {name}.")
        names[ours] = name
    return names, num_layers


def _port_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """The place of every canonical tensor in `language_model`: keys of nested dictionaries, the last one with dots in it."""
    names: dict[str, tuple[str, ...]] = {}
    for ours in ("transformer.wte", "transformer.wpe", "transformer.wqe"):
        names[f"{ours}.weight"] = (*_GLOBAL[ours], "weight")
    for layer in range(num_layers):
        block = f"layers.{layer}" if layer < num_layers - 1 else "topQueryLayer"
        for ours, theirs in _IN_BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"transformer.h.{layer}.{ours}.{kind}"] = ("transformer", f"{block}.{theirs}.{kind}")
    section, norm = _GLOBAL["transformer.ln_f"]
    return names | {f"transformer.ln_f.{kind}": (section, f"{norm}.{kind}") for kind in ("weight", "bias")}


@cache
def _split_dims() -> dict[str, int | None]:
    """The split dimension of every tensor of a model of one layer: it depends on the name alone."""
    specs = model_specs(ModelConfig(num_layers=1, hidden_size=1, num_heads=1, vocab_size=10, max_positions=1))
    return {name: spec.split_dim for name, spec in specs.items()}


def _full_shape(
    files: list[Path], name: str, pieces: list[StoredTensor], split_dim: int | None, overrides: Overrides
) -> tuple[int, ...] | None:
    """Shape of the full tensor; None if problems are collected and the pieces do not make a tensor."""
    if len(pieces) < len(files):
        return None
    first = pieces[0]
    for file, piece in zip(files, pieces, strict=True):
        if (piece.shape, piece.dtype) != (first.shape, first.dtype):
            expected = f"{first.dtype} {list(first.shape)} as in {files[0]}"
            overrides.report(file, [f"{name} is {piece.dtype} {list(piece.shape)}, expected {expected}"], ".")
            return None
    if split_dim is None or split_dim >= len(first.shape):
        return first.shape
    return tuple(extent * len(pieces) if dim == split_dim else extent for dim, extent in enumerate(first.shape))


def _vocab_size(path: Path, rows: int, num_files: int, root: dict[Any, Any], described: dict[str, Any]) -> int:
    """Number of rows of a word embedding that are vocabulary and not padding.

    Our own key contains it. Otherwise only the published vocabulary is recognised, and only if the number of rows is what the port pads it
    to: a multiple of 128 per rank for 1, 2, 4 or 8 ranks (files may have been merged since), or as the file's arguments say. Any other
    number of rows is taken for the vocabulary size.
    """
    if "vocab_size" in described:
        size = described["vocab_size"]
        if type(size) is not int or not 0 < size <= rows or -(-size // num_files) * num_files != rows:
            raise InputError(f"{path}: says its vocabulary has {str(size)[:20]} tokens; its word embedding's {rows} rows do not fit that.")
        return size
    multiple = _arguments(root).get("make_vocab_size_divisible_by")
    multiples = [multiple * num_files] if type(multiple) is int and 0 < multiple < 10**6 else [128 * ranks for ranks in (1, 2, 4, 8)]
    return VOCAB_SIZE if rows in [-(-VOCAB_SIZE // number) * number for number in multiples] else rows


def _arguments(root: dict[Any, Any]) -> dict[Any, Any]:
    """The command line of the training run that saved the file; empty for converted files."""
    arguments = root.get("args")
    return arguments.state if isinstance(arguments, Opaque) and isinstance(arguments.state, dict) else {}


def _described(root: dict[Any, Any]) -> tuple[dict[str, Any], str]:
    """What the file contains about the model by `ModelConfig` key, and in words the source of its GELU."""
    mark = root.get(DIALECT)
    if isinstance(mark, dict):
        return {key: mark[key] for key in _MARKED if type(mark.get(key)) in (int, str)}, "GELU and heads as it says itself"
    arguments = _arguments(root)
    if not arguments:
        return {}, "with no word about its GELU: tanh, which trained the released weights, unless --gelu says otherwise (the port runs erf)"
    on = {flag for flag, value in arguments.items() if value is True}
    heads = arguments.get("num_attention_heads")
    flagged = (name for name, activation in ACTIVATIONS.items() if on.intersection(activation.megatron_flags or ()))
    usual = next(name for name, activation in ACTIVATIONS.items() if activation.megatron_flags == ())
    described: dict[str, Any] = {"gelu": next(flagged, usual)}
    if type(heads) is int and heads > 0:
        described["num_heads"] = heads
    return described, f"saved by a training run with {described['gelu']} GELU"


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def write(weights: Weights, output: Path, options: WriteOptions) -> None:
    """Write a directory of `options.tensor_parallel` files with its tracker, and the tokenizer's `vocab.model` if there is one.

    Each tensor is read once; one of them is in memory at a time, whatever the number of files.

    Raises:
        InputError: if the model cannot be split into that many files, or is one that the port would compute wrongly.
        OSError: if a file cannot be written.
    """
    config, ranks = weights.config, options.tensor_parallel
    if ranks < 1 or config.num_heads % ranks or config.ffn_hidden_size % ranks:
        raise InputError(f"--tensor-parallel {ranks} does not divide the model's {config.num_heads} heads. Choose one that does.")
    if config.final_norm != "before_query" or ACTIVATIONS[config.gelu].megatron_flags is None:
        wrong = "final norm after the query layer" if config.final_norm != "before_query" else f"{config.gelu} GELU"
        raise InputError(f"{output}: the PyTorch port cannot run a model with {wrong}; its logits would be others. Write huggingface.")
    folder = output / (f"iter_{weights.step:07d}" if weights.step else "release")
    specs, names = model_specs(config), _port_names(config.num_layers)
    with ExitStack() as stack:
        writers = []
        for rank in range(ranks):
            (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
            language_model: dict[str, Any] = {}
            for ours, (*sections, key) in names.items():
                inner = language_model
                for section in sections:
                    inner = inner.setdefault(section, {})
                inner[key] = Planned(specs[ours].local_shape(ranks), _dtype(weights.tensors[ours], options))
            mark = {key: getattr(config, key) for key in _MARKED}
            root = {"iteration": weights.step or 0, "model": {"language_model": language_model}, DIALECT: mark}
            writers.append(stack.enter_context(TorchFileWriter(folder / f"mp_rank_{rank:02d}" / FILE, root)))
        for ours in names:
            full = weights.tensors[ours].read()
            for rank, writer in enumerate(writers):
                writer.write(specs[ours].slice(full, rank, ranks))
            del full
    (output / TRACKER).write_text(f"{weights.step or 'release'}\n", encoding="ascii")
    if weights.tokenizer is not None:
        copy_model(weights.tokenizer, output)


def _dtype(tensor: LazyTensor, options: WriteOptions) -> torch.dtype:
    return options.dtype or tensor.dtype
