from pathlib import Path
from typing import Any

import pytest
import yaml

from pangu.errors import InputError
from pangu.planner.hardware import Cluster, Figure, load_cluster

CLUSTERS = Path(__file__).parents[3] / "ds_configs" / "clusters"


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "mark": "memory", "source": "a test"}


def level(name: str, devices: int) -> dict[str, Any]:
    return {"name": name, "devices": devices, "bandwidth": figure(10), "latency_us": figure(1)}


def values(*levels: dict[str, Any]) -> dict[str, Any]:
    device = {
        "name": "d",
        "memory_gib": figure(1),
        "memory_bandwidth": figure(1),
        "host_bandwidth": figure(1),
        "host_memory_gib": figure(64),
        "peak_tflops": {"bf16": figure(1)},
    }
    return {"name": "c", "device": device, "levels": list(levels) or [level("server", 8), level("cluster", 64)]}


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_clusters_that_ship(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    assert cluster.device.memory_gib.source


def test_the_table_in_the_documents_is_that_of_the_files() -> None:
    def text(figure: Figure) -> str:
        return f"{figure.value:g}{'' if figure.mark == 'vendor' else ' ?'}"

    page = (CLUSTERS.parents[1] / "docs" / "planner.md").read_text(encoding="utf-8")
    for path in CLUSTERS.glob("*.yaml"):
        cluster = load_cluster(path)
        device = cluster.device
        peak = device.peak_tflops.get("fp16") or device.peak_tflops["fp32"]
        levels = ", ".join(f"{unit.name} {unit.devices}: {text(unit.bandwidth)}" for unit in cluster.levels)
        cells = [f"`{path.stem}`", device.name, text(device.memory_gib), text(device.memory_bandwidth), text(peak), levels]
        assert f"| {' | '.join(cells)} |" in page


def test_the_papers_cluster() -> None:
    cluster = load_cluster(CLUSTERS / "ascend910_2048.yaml")
    assert cluster.num_devices == 2048
    assert [unit.devices for unit in cluster.levels[:2]] == [4, 8]
    assert cluster.levels[0].bandwidth.value > cluster.levels[1].bandwidth.value


def test_another_number_of_devices() -> None:
    cluster = Cluster.model_validate(values())

    def sizes(count: int) -> list[tuple[str, int]]:
        return [(unit.name, unit.devices) for unit in cluster.with_devices(count).levels]

    assert sizes(1024) == [("server", 8), ("cluster", 1024)]
    assert sizes(8) == [("server", 8)]
    assert sizes(3) == [("server", 3)]
    with pytest.raises(InputError, match=r"12 devices do not fill whole servers of 8 \(cluster c\)\. Choose 8 or 16\."):
        cluster.with_devices(12)
    with pytest.raises(InputError, match="0 devices"):
        cluster.with_devices(0)


def broken(**changes: Any) -> dict[str, Any]:
    return {**values(), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(speed=1), "unknown key speed"),
        (broken(device={}), "device.name is missing"),
        (broken(levels=[]), "levels = []"),
        (values(level("server", 8), level("cluster", 12)), "a cluster of 12 devices cannot be made of servers of 8"),
        (values(level("server", 8), level("cluster", 8)), "a larger multiple of 8"),
        (values(level("cluster", 8), level("server", 64)), "levels go from the innermost out"),
        (values(level("server", 0)), "levels.0.devices = 0"),
        (values(level("shelf", 8)), "levels.0.name = 'shelf'"),
        (values({**level("server", 8), "bandwidth": figure(0)}), "levels.0.bandwidth.value = 0"),
        (values({**level("server", 8), "bandwidth": figure(-1)}), "levels.0.bandwidth.value = -1"),
        (values({**level("server", 8), "bandwidth": figure(float("inf"))}), "levels.0.bandwidth.value = inf"),
        (values({**level("server", 8), "bandwidth": 300}), "levels.0.bandwidth = 300, but a section of keys is expected"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        load_cluster(tmp_path / "nowhere.yaml")
