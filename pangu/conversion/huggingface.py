"""Canonical weights: a HuggingFace directory that training writes and that training, generation and conversion read.

`config.json`, `model-0000i-of-0000n.safetensors`, `model.safetensors.index.json`, the tokenizer's `vocab.model`, and the code with which
transformers 5 loads it (`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`, also `AutoTokenizer`). Names are the
community's (`transformer.h.{i}.attn.q_proj.weight` …, the query layer being the last `h`); the output layer is tied and not stored.

Copies of PanGu-α that others have published are read too: `pytorch_model.bin`, `attn.out_proj`, a stored copy of the output layer, masks
kept as buffers, a vocabulary padded by the tool that the copy came from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pangu.config import ModelConfig
from pangu.config.activations import ACTIVATIONS
from pangu.conversion.weights import VOCAB_SIZE, Overrides, Weights, WriteOptions, complete
from pangu.errors import InputError
from pangu.files import load_json
from pangu.tensor_files import torch_file
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.tensor_files.safetensors_file import num_bytes, open_tensors, write_tensors
from pangu.tensor_files.torch_file import StoredTensor
from pangu.text.tokenizer import EOT, MASK, PAD, SEP, UNK, copy_model

CONFIG, INDEX, SINGLE, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "vocab.model"
WRITTEN_NAMES = r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|(tokenizer_)?config\.json|vocab\.model|\w+_pangu\.py"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
REMOTE_CODE = Path(__file__).parent / "remote_code"
"""The code with which transformers loads a directory. It is copied with the weights, so it imports nothing from this project."""
SHARD_BYTES = 2 * 2**30
"""Largest size of a file in bytes, unless one tensor is larger. Training holds a whole file in host memory, conversion one tensor."""

# Our name of each field of config.json that means the same, and the least number it can be.
_FIELDS = {
    "vocab_size": ("vocab_size", 1),
    "max_position_embeddings": ("max_positions", 1),
    "hidden_size": ("hidden_size", 1),
    "num_layers": ("num_layers", 1),
    "num_heads": ("num_heads", 1),
    "intermediate_size": ("ffn_hidden_size", 1),
    "eos_token_id": ("separator_id", 0),
    "pad_token_id": ("pad_id", 0),
}
_GELU = {theirs: ours for ours, activation in ACTIVATIONS.items() for theirs in activation.huggingface}
_FINAL_NORM = {"before_query": "before_query", "after_query": "after_query"}
_EPSILON = 1e-5

_WORDS, _HEAD = "transformer.wte.weight", "lm_head.weight"
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
# The Megatron port padded the vocabulary to a multiple of 128 a tensor-parallel rank.
_PADDED_VOCABULARIES = {-(-VOCAB_SIZE // (128 * ranks)) * 128 * ranks for ranks in (1, 2, 4, 8)}


def detect(path: Path) -> bool:
    """Whether a path is a directory in HuggingFace's form."""
    return any((path / name).is_file() for name in (CONFIG, INDEX, SINGLE, BIN_INDEX, BIN_SINGLE))


# --- reading -----------------------------------------------------------------------------------------------------------------------------


def read(path: Path, overrides: Overrides) -> Weights:
    """The weights of a directory, written by this project or published by others.

    Names, shapes and dtypes are read and checked now; a stored output layer is compared with the word embedding. Other tensors are read
    when they are asked for, slice by slice.

    Raises:
        InputError: if it is not such a directory, or does not hold one complete model.
    """
    values = _read_object(path / CONFIG)
    described = _describe(path / CONFIG, values)
    ours = "final_norm" in values  # which no other tool writes
    stored, container, files = _open_files(path, overrides)
    tensors: dict[str, LazyTensor] = {}
    left_out: list[str] = []
    remarks = [] if ours else ["published by others"]
    for name, tensor in stored.items():
        canonical = _canonical_name(name, base="wte.weight" in stored)
        if _BUFFER.fullmatch(canonical):
            left_out.append(name)
        elif canonical in tensors:
            overrides.report(path, [f"holds {canonical} twice, once as {name}"], ".")
        else:
            tensors[canonical] = tensor
    if any(".out_proj." in name for name in stored):
        remarks.append("attn.out_proj read as attn.c_proj")
    if _HEAD in tensors and _WORDS in tensors:
        head = tensors.pop(_HEAD)
        left_out.append(_HEAD)
        if not overrides.strict:  # it need not be read to see what is there
            tensors[_WORDS] = replace(tensors[_WORDS], copies=lambda: [(_HEAD, head)])
            remarks.append(f"{_HEAD} stored too")
        elif _equal(head, tensors[_WORDS]):
            remarks.append(f"{_HEAD} equal to {_WORDS}, left out")
        else:
            raise InputError(
                f"{path}: {_HEAD} differs from {_WORDS}. PanGu-α's output layer is the word embedding; a model whose output layer was "
                "trained apart is another model, which no other format can hold."
            )
    rows = tensors[_WORDS].shape[0] if _WORDS in tensors and tensors[_WORDS].shape else 0
    if not ours and rows in _PADDED_VOCABULARIES - {VOCAB_SIZE}:
        tensors[_WORDS] = _first_rows(tensors[_WORDS], VOCAB_SIZE)
        described["vocab_size"] = VOCAB_SIZE
        remarks.append(f"vocabulary cut from {rows} to the published {VOCAB_SIZE} ids")
    if not ours and described["gelu"] == "erf" and overrides.gelu is None:
        remarks.append(
            f"activation erf as its {CONFIG} says, ALTHOUGH THE RELEASED WEIGHTS WERE TRAINED WITH tanh: unless these were trained "
            "further with erf, --gelu tanh gives the released model"
        )
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            overrides.report(path, [f"{name} is {kind}; expected floating point"], ". Quantised weights cannot be converted.")
    tokenizer = path / TOKENIZER if (path / TOKENIZER).is_file() else None
    source = "; ".join([f"HuggingFace directory ({container})", *remarks])
    return complete(
        path, tensors, overrides, source=source, described=described, left_out=tuple(left_out), tokenizer=tokenizer, files=tuple(files)
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = load_json(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a weights directory with {CONFIG}.") from None
    except ValueError:
        raise InputError(f"{path}: not valid JSON.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object.")
    return values


def _describe(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json by `ModelConfig` key."""
    if values.get("model_type") not in ("gpt_pangu", "pangu"):
        raise InputError(f'{path}: describes no PanGu model; expected "model_type": "gpt_pangu".')
    described: dict[str, Any] = {}
    for theirs, (ours, least) in _FIELDS.items():
        value = values.get(theirs)
        if value is None:
            continue
        if type(value) is not int or value < least:
            raise InputError(f"{path}: {theirs} = {value!r}; expected a whole number of {least} or more.")
        described[ours] = value
    for theirs, ours in (("resid_pdrop", "hidden_dropout"), ("attn_pdrop", "attention_dropout")):
        value = values.get(theirs)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(f"{path}: {theirs} = {value!r}; expected a number from 0 to less than 1.")
        described[ours] = float(value)
    for theirs, ours, default, known in (
        ("activation_function", "gelu", None, _GELU),
        ("final_norm", "final_norm", "before_query", _FINAL_NORM),
    ):
        value = values.get(theirs, default)
        if not isinstance(value, str) or value not in known:
            raise InputError(f"{path}: {theirs} = {value!r}; expected one of {', '.join(known)}.")
        described[ours] = known[value]
    # What our layers do, and what another value would silently turn into another model.
    for theirs, expected in (("layer_norm_epsilon", _EPSILON), ("scale_attn_weights", True)):
        value = values.get(theirs)
        if value is not None and value != expected:
            raise InputError(f"{path}: {theirs} = {value!r}; PanGu-α has {expected!r}.")
    return described


def _canonical_name(name: str, *, base: bool) -> str:
    """The canonical name of a tensor that a community model calls `name`; `base`: whether it was saved without its output layer."""
    name = name.removeprefix("module.")
    if base:
        name = f"transformer.{name}"
    return name.replace(".attn.out_proj.", ".attn.c_proj.")


def _open_files(path: Path, overrides: Overrides) -> tuple[dict[str, LazyTensor], str, list[Path]]:
    """Every stored tensor by its own name, the kind of its files, and the files."""
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (path / index).exists():
            tensors: dict[str, LazyTensor] = {}
            files = _read_index(path / index, Path(single).suffix)
            for file, names in files.items():
                try:
                    found = _open_file(file)
                except InputError as error:
                    if overrides.problems is None:
                        raise
                    overrides.problems.append(str(error))
                    continue
                absent = [name for name in names if name not in found]
                if absent and overrides.strict:
                    raise InputError(f"{file}: lacks {absent[0]}, which {index} says it holds. Copy or convert the weights again.")
                tensors |= {name: found[name] for name in names if name in found}
            return tensors, Path(single).suffix.removeprefix("."), list(files)
        if (path / single).exists():
            return _open_file(path / single), Path(single).suffix.removeprefix("."), [path / single]
    raise InputError(f"{path / SINGLE}: cannot be read: there is neither it nor {INDEX}, {BIN_SINGLE} or {BIN_INDEX}.")


def _read_index(index: Path, suffix: str) -> dict[Path, list[str]]:
    try:
        entries = load_json(index)["weight_map"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index}: not an index of {suffix} files; expected an object with a weight_map.") from None
    files: dict[Path, list[str]] = {}
    for name, file in entries:
        # Never follow a path out of the directory.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}", file) or not file.endswith(suffix):
            raise InputError(f"{index}: {name} points to {file!r}; expected the name of a file beside it.")
        files.setdefault(index.parent / file, []).append(name)
    return files


def _open_file(path: Path) -> dict[str, LazyTensor]:
    return open_tensors(path) if path.suffix == ".safetensors" else _open_pickled(path)


def _open_pickled(path: Path) -> dict[str, LazyTensor]:
    root = torch_file.load(path)
    if type(root) is not dict or not all(type(name) is str and isinstance(value, StoredTensor) for name, value in root.items()):
        raise InputError(f"{path}: not a flat table of tensors, which a model's {BIN_SINGLE} is. Convert it from the format it is in.")

    def lazy(stored: StoredTensor) -> LazyTensor:
        return LazyTensor(stored.shape, stored.dtype, stored.read, lambda dim, begin, end: stored.read().narrow(dim, begin, end - begin))

    return {name: lazy(stored) for name, stored in root.items()}


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two matrices hold the same numbers, compared a few rows at a time."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    rows, step = one.shape[0], max(1, 2**22 // max(1, one.shape[1]))
    ranges = [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    return all(torch.equal(one.part(0, *part).float(), other.part(0, *part).float()) for part in ranges)


def _first_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    def copies() -> list[tuple[str, LazyTensor]]:
        return [(place, _first_rows(copy, count)) for place, copy in tensor.copies()]

    return LazyTensor((count, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:count], tensor.read_part, copies)


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def write(weights: Weights, output: Path, options: WriteOptions) -> None:
    """Write a canonical directory, holding one tensor at a time.

    Args:
        weights: weights of any format.
        output: the directory to create. `pangu.conversion.convert` makes it appear complete or not at all.
        options: only `dtype` is used.
    """
    output.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(output, dtype=options.dtype)
    for name, tensor in weights.tensors.items():
        writer.add(name, tensor)
    writer.flush()
    finish(output, writer.files, weights.config, options.dtype or weights.dtype, weights.tokenizer)


@dataclass(frozen=True)
class WrittenFile:
    """A file of tensors under the name that it has until the number of files is known."""

    name: str
    sizes: dict[str, int]
    """Bytes of each tensor in it."""


class FileWriter:
    """Puts tensors into files of at most `SHARD_BYTES`, or of one tensor that is larger.

    Args:
        directory: where the files go.
        stage: tells apart the files of several writers of one directory.
        dtype: of the written tensors; None keeps each tensor's own.
    """

    def __init__(self, directory: Path, *, stage: int = 0, dtype: torch.dtype | None = None) -> None:
        self.files: list[WrittenFile] = []
        """What was written."""
        self._directory, self._stage, self._dtype = directory, stage, dtype
        self._pending: dict[str, LazyTensor] = {}
        self._room = SHARD_BYTES

    def add(self, name: str, tensor: LazyTensor) -> None:
        """Take a tensor, which is read when its file is written: with `flush`, or as soon as another finds no room in it."""
        size = num_bytes(tensor, self._dtype)
        if self._pending and size > self._room:
            self.flush()
        self._pending[name] = tensor
        self._room -= size

    def flush(self) -> None:
        """Write the file that is being filled.

        Raises:
            OSError: if it cannot be written.
        """
        pending, self._pending, self._room = self._pending, {}, SHARD_BYTES
        if pending:
            name = f"stage{self._stage:03d}-{len(self.files):05d}.safetensors"
            write_tensors(self._directory / name, pending, self._dtype)
            self.files.append(WrittenFile(name, {key: num_bytes(tensor, self._dtype) for key, tensor in pending.items()}))


def finish(directory: Path, files: Sequence[WrittenFile], config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None) -> None:
    """Make written files a canonical directory: their final names, the index, and what lies beside the tensors.

    Args:
        directory: holds the files.
        files: of all writers, in the model's order.
        config: the model.
        dtype: what it computes in.
        tokenizer: a `vocab.model` to copy, or the directory that holds it.
    """
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.rename(directory / file.name, directory / final)
        weight_map.update(dict.fromkeys(file.sizes, final))
    total = sum(sum(file.sizes.values()) for file in files)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    _write_companions(directory, config, dtype, tokenizer)


def _write_companions(directory: Path, config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None) -> None:
    """Write the other files of the directory: config.json, the tokenizer, the code for transformers."""
    _write_json(directory / CONFIG, _config_json(config, dtype))
    _write_json(directory / "tokenizer_config.json", _tokenizer_json(config))
    for module in sorted(REMOTE_CODE.glob("*.py")):
        shutil.copyfile(module, directory / module.name)
    if tokenizer is not None:
        copy_model(tokenizer, directory)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "gpt_pangu",
        "architectures": ["GPTPanguForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_pangu.GPTPanguConfig",
            "AutoModel": "modeling_pangu.GPTPanguModel",
            "AutoModelForCausalLM": "modeling_pangu.GPTPanguForCausalLM",
        },
        **{theirs: getattr(config, ours) for theirs, (ours, _) in _FIELDS.items()},
        "bos_token_id": config.separator_id,
        "activation_function": ACTIVATIONS[config.gelu].huggingface[0],
        "final_norm": config.final_norm,
        "layer_norm_epsilon": _EPSILON,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _tokenizer_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "GPTPanguTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_pangu.GPTPanguTokenizer", None]},
        "model_max_length": config.max_positions,
        "padding_side": "left",
        # A text that holds "<eot>" is to get the ids it had in training, and not to end a document.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "unk_token": UNK,
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": PAD,
        "sep_token": SEP,
        "mask_token": MASK,
    }
