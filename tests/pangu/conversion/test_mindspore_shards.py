from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import golden_weights
from helpers.mindspore_bytes import checkpoint, strategy
from helpers.mindspore_shards_of import EMBEDDINGS, layout_of, shards_of, write_shards

from pangu.conversion import mindspore, mindspore_shards
from pangu.conversion.weights import Overrides, Weights, WriteOptions
from pangu.errors import InputError

HEADS = Overrides(num_heads=4)
Layouts = dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]]


@pytest.fixture
def golden(shared: Path) -> dict[str, np.ndarray]:
    return golden_weights(shared)


@pytest.fixture
def layouts(golden: dict[str, np.ndarray]) -> Layouts:
    return {"loss_scale": ((), (), 0, 0), **{name: layout_of(name, array, 4, 2) for name, array in golden.items()}}


@pytest.fixture
def eight(golden: dict[str, np.ndarray], layouts: Layouts, tmp_path: Path) -> Path:
    """The golden weights over eight ranks, in the form of the release."""
    folder = write_shards(tmp_path / "released", golden, 4, 2)
    (folder / "pangu_ckpt_strategy.ckpt").write_bytes(strategy(layouts))
    return folder


def same(weights: Weights, arrays: Mapping[str, np.ndarray]) -> None:
    names = mindspore.file_names(weights.config)
    assert set(names.values()) == set(arrays)
    for ours, name in names.items():
        found = mindspore.stored_layout(ours, weights.tensors[ours])
        assert found.shape == arrays[name].shape
        assert np.array_equal(found.read().numpy(), arrays[name]), name


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        mindspore_shards.read(path, HEADS)
    assert "\n" not in str(caught.value)


def test_eight_ranks(eight: Path, golden: dict[str, np.ndarray]) -> None:
    assert mindspore_shards.detect(eight)
    weights = mindspore_shards.read(eight, HEADS)
    same(weights, golden)
    assert "8 ranks with embeddings from .npy" in weights.source
    assert (weights.config.gelu, weights.config.final_norm) == ("tanh", "before_query")


def test_to_one_checkpoint(eight: Path, shared: Path, tmp_path: Path) -> None:
    mindspore.write(mindspore_shards.read(eight, HEADS), tmp_path / "one.ckpt", WriteOptions())
    assert (tmp_path / "one.ckpt").read_bytes() == (shared / "oracle/A/pangu_tiny.ckpt").read_bytes()


def test_as_training_leaves_them(golden: dict[str, np.ndarray], layouts: Layouts, tmp_path: Path) -> None:
    """A folder a rank, embeddings and optimizer states inside, the strategy file beside the folder."""
    folder = tmp_path / "trained"
    folder.mkdir()
    held = {name: shards_of(name, array, 4, 2) for name, array in golden.items()}
    for rank in range(8):
        file = folder / f"rank_{rank}" / "PanguAlpha-0_8.ckpt"
        file.parent.mkdir()
        arrays = {name: shards[rank] for name, shards in held.items()}
        states = {f"adam_m.{name}": array for name, array in arrays.items()}
        file.write_bytes(checkpoint({**arrays, **states, "global_step": np.full(1, 8, np.int32)}))
    (tmp_path / "strategy.ckpt").write_bytes(strategy(layouts))
    weights = mindspore_shards.read(folder, HEADS)
    same(weights, golden)
    assert weights.step == 8
    assert len(weights.left_out) == 54

    (folder / "rank_3/PanguAlpha-0_8.ckpt").write_bytes(checkpoint({**arrays, **states, "global_step": np.full(1, 7, np.int32)}))
    refused(folder, "different training steps: 7, 8")
    (folder / "rank_3/PanguAlpha-0_9.ckpt").write_bytes(b"")
    refused(folder, "rank_3: holds 2 .ckpt files")


@pytest.mark.parametrize(
    ("layout", "holders"),
    [
        # Matrix of 8 rows and 4 columns; for each rank that is needed, the rows and columns it holds.
        (((2, 2), (-1, -1), 0, 0), {0: (slice(0, 8), slice(0, 4))}),
        (((2, 2), (1, 0), 0, 0), {r: (slice(r // 2 * 4, r // 2 * 4 + 4), slice(r % 2 * 2, r % 2 * 2 + 2)) for r in range(4)}),
        (((2, 2), (0, 1), 0, 0), {r: (slice(r % 2 * 4, r % 2 * 4 + 4), slice(r // 2 * 2, r // 2 * 2 + 2)) for r in range(4)}),
        (((4,), (-1, -1), 1, -1), {r: (slice(r * 2, r * 2 + 2), slice(0, 4)) for r in range(4)}),
        (((4,), (-1, -1), 1, 2), {r: (slice(r * 4, r * 4 + 4), slice(0, 4)) for r in range(2)}),
        (((2, 2), (-1, 1), 1, -1), {r: (slice(r % 2 * 4, r % 2 * 4 + 4), slice(r // 2 * 2, r // 2 * 2 + 2)) for r in range(4)}),
        (((4, 2), (-1, 0), 2, 2), {r: (slice(r // 2 * 4, r // 2 * 4 + 4), slice(r % 2 * 2, r % 2 * 2 + 2)) for r in range(4)}),
    ],
)
def test_other_layouts(layout: tuple[tuple[int, ...], tuple[int, ...], int, int], holders: dict[int, tuple[slice, slice]]) -> None:
    full = np.arange(32).reshape(8, 4)
    counts, placed = mindspore_shards.Layout(*layout).slices()
    assert len(placed) == len(holders)
    height, width = 8 // counts[0], 4 // counts[1]
    for rank, (row, column) in placed:
        assert np.array_equal(full[row * height : (row + 1) * height, column * width : (column + 1) * width], full[holders[rank]])


@pytest.mark.parametrize(("size", "hidden", "layers"), [("2.6B", 2560, 32), ("13B", 5120, 40)])
def test_the_published_strategy_files(shared: Path, size: str, hidden: int, layers: int) -> None:
    layouts = mindspore_shards.read_strategy(shared / f"oracle/pangu_alpha_{size}_ckpt_strategy.ckpt")
    assert len([name for name in layouts if name.startswith("backbone.")]) == 16 * layers + 5

    def per_rank(name: str, *shape: int) -> list[int]:
        layout = layouts[f"backbone.{name}"]
        assert layout.dev_matrix == (64, 8)
        counts, _ = layout.slices()
        return [full // count for full, count in zip(shape, counts, strict=True)]

    for block in ("blocks.0", f"blocks.{layers - 2}", "top_query_layer"):
        for matrix in ("dense1", "dense2", "dense3", "projection"):
            assert per_rank(f"{block}.attention.{matrix}.weight", hidden, hidden) == [hidden // 512, hidden]
        assert per_rank(f"{block}.output.mapping.weight", hidden, 4 * hidden) == [hidden // 64, hidden // 2]
        assert per_rank(f"{block}.output.projection.weight", 4 * hidden, hidden) == [hidden // 128, hidden]
        assert per_rank(f"{block}.attention.dense1.bias", hidden) == [hidden // 512]
        assert per_rank(f"{block}.output.mapping.bias", 4 * hidden) == [hidden // 128]
        assert per_rank(f"{block}.output.projection.bias", hidden) == [hidden]
        assert per_rank(f"{block}.layernorm1.gamma", hidden) == [hidden]
    assert per_rank("word_embedding.embedding_table", 40000, hidden) == [40000, hidden]


def test_512_ranks_by_the_published_strategy(shared: Path, tmp_path: Path) -> None:
    """A two-layer model small enough for a test, in the release's 512 files."""
    hidden, generator = 512, np.random.default_rng(3)
    shapes = {f"backbone.{name}.embedding_table": (8, hidden) for name in EMBEDDINGS}
    shapes["backbone.word_embedding.embedding_table"] = (16, hidden)
    for name, array in golden_weights(shared).items():
        if "embedding" not in name and "blocks.1" not in name:
            shapes[name] = tuple({64: hidden, 256: 2 * hidden}[length] for length in array.shape)
    arrays = {name: generator.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    folder = write_shards(tmp_path / "released", arrays, 64, 8)
    (folder / "strategy.ckpt").write_bytes((shared / "oracle/pangu_alpha_2.6B_ckpt_strategy.ckpt").read_bytes())
    same(mindspore_shards.read(folder, HEADS), arrays)


def test_the_loader_s_npy_wins(eight: Path, golden: dict[str, np.ndarray]) -> None:
    name = "backbone.word_embedding.embedding_table"
    for rank in range(8):
        file = eight / f"filerted_{rank}.ckpt"
        file.write_bytes(file.read_bytes() + checkpoint({name: golden[name] + 1}))
    same(mindspore_shards.read(eight, HEADS), golden)


class TestRefused:
    def test_a_missing_part(self, eight: Path, layouts: Layouts, tmp_path: Path) -> None:
        (eight / "position_embedding.npy").unlink()
        refused(eight, "lacks position_embedding.npy")
        (eight / "filerted_5.ckpt").rename(eight / "filerted_8.ckpt")
        refused(eight, "no file of rank 5; looked for filerted_5.ckpt")
        (eight / "filerted_8.ckpt").unlink()
        (eight / "filerted_7.ckpt").rename(eight / "filerted_5.ckpt")
        refused(eight, "the files of 7 ranks, pangu_ckpt_strategy.ckpt describes 8")
        (eight / "second_strategy.ckpt").write_bytes(strategy(layouts))
        refused(eight, "holds 2 strategy files")
        for file in eight.glob("*strategy*"):
            file.unlink()
        refused(eight, r"looked for \*strategy\*.ckpt there and beside it")
        refused(tmp_path / "nothing", "not a directory")

    def test_a_rank_that_differs(self, eight: Path, golden: dict[str, np.ndarray]) -> None:
        file = eight / "filerted_6.ckpt"
        content = file.read_bytes()
        arrays = {name: shards_of(name, array, 4, 2)[6] for name, array in golden.items() if "embedding" not in name}
        file.write_bytes(checkpoint({name: array for name, array in arrays.items() if name != "backbone.layernorm.gamma"}))
        refused(eight, "filerted_6.ckpt: lacks backbone.layernorm.gamma, which filerted_0.ckpt holds")
        file.write_bytes(checkpoint(arrays | {"backbone.layernorm.gamma": np.ones(32, np.float32)}))
        refused(eight, r"filerted_6.ckpt: backbone.layernorm.gamma is Float32 \[32\]")
        file.write_bytes(content[: len(content) // 2])
        refused(eight, "filerted_6.ckpt: byte")

    @pytest.mark.parametrize(
        ("layout", "match"),
        [
            (((4, 2), (0,), 2, -1), "along 1 dimensions"),
            (((4, 2), (0, 2), 2, -1), "tensor_map"),
            (((4, 2), (0, -2), 2, -1), "tensor_map"),
            (((4, 2), (0, 0), 2, -1), "tensor_map"),
            (((4, 2), (0, -1), 3, -1), "do not share a slice"),
            (((4, 2), (0, -1), 2, 5), "do not share a slice"),
            (((4, 2), (0, -1), 2, 2**40), "do not share a slice"),
            (((4, 4), (0, -1), 2, -1), "describes 8 or 16"),
            (((4, 0), (0, -1), 2, -1), "over devices"),
            (((2**40, 2**40), (0, -1), 2, -1), "over devices"),
            (((1,) * 100, (0, -1), 2, -1), "dimensions"),
            (((8,), (-1, -1), 0, 0), "attn.q_proj.weight has shape"),
        ],
    )
    def test_a_layout_that_cannot_be(
        self, eight: Path, layouts: Layouts, layout: tuple[tuple[int, ...], tuple[int, ...], int, int], match: str
    ) -> None:
        layouts["backbone.blocks.0.attention.dense1.weight"] = layout
        (eight / "pangu_ckpt_strategy.ckpt").write_bytes(strategy(layouts))
        refused(eight, match)

    def test_a_parameter_without_layout(self, eight: Path, layouts: Layouts) -> None:
        del layouts["backbone.layernorm.gamma"]
        (eight / "pangu_ckpt_strategy.ckpt").write_bytes(strategy(layouts))
        refused(eight, "does not say how backbone.layernorm.gamma is cut")

    def test_damaged_strategy_files(self, eight: Path, layouts: Layouts) -> None:
        path = eight / "pangu_ckpt_strategy.ckpt"
        content = strategy(layouts)
        generator = np.random.default_rng(7)
        read = 0
        for round_ in range(150):
            damaged = bytearray(content)
            if round_ % 3 == 0:
                del damaged[int(generator.integers(len(content))) :]
            else:
                for at in generator.integers(len(content), size=round_ % 3):
                    damaged[at] = generator.integers(256)
            path.write_bytes(damaged)
            try:
                for layout in mindspore_shards.read_strategy(path).values():
                    layout.slices()
                read += 1
            except InputError as error:
                assert str(path) in str(error)
            except ValueError as error:
                assert "do not share" in str(error)
        assert 5 < read < 100, read
        path.write_bytes((eight / "filerted_0.ckpt").read_bytes())
        refused(eight, "holds no layouts")


def test_tensors_are_put_together_when_asked_for(eight: Path) -> None:
    weights = mindspore_shards.read(eight, HEADS)
    for rank in range(1, 8):
        (eight / f"filerted_{rank}.ckpt").unlink()
    assert isinstance(weights.tensors["transformer.ln_f.weight"].read(), torch.Tensor)
    with pytest.raises(InputError, match=r"filerted_2.ckpt: cannot be read"):
        weights.tensors["transformer.h.0.attn.q_proj.weight"].read()
