"""tests/ mirrors the packages: pangu/data/packing.py is tested by tests/pangu/data/test_packing.py, or a line here says by what.

A line may name only tests that reach the module: by imports, or by starting a program that imports it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from architecture import ROOT, edges, read_tree

ELSEWHERE = {
    "megatron_ext/context.py": "tests/megatron_ext/test_layers.py",  # every layer is handed one
    "megatron_ext/errors.py": "tests/megatron_ext/test_topology.py",
    "megatron_ext/supervision/rendezvous.py": "tests/megatron_ext/test_accelerator.py",
    "megatron_ext/supervision/thread_location.py": "tests/megatron_ext/supervision/test_watchdog.py",
    # Programs: in tests/cli and tests/tools, under the names that people start.
    "pangu/__main__.py": "tests/cli/test_pangu.py",
    "pangu/benchmark.py": "tests/tools/test_benchmark.py",
    "pangu/convert.py": "tests/cli/test_convert_checkpoint.py",
    "pangu/evaluate.py": "tests/cli/test_evaluate.py",
    "pangu/generate.py": "tests/cli/test_generate.py",
    "pangu/inspect_checkpoint.py": "tests/cli/test_inspect_checkpoint.py",
    "pangu/plan.py": "tests/tools/test_plan_parallel.py",
    "pangu/plot.py": "tests/tools/test_plot_run.py",
    "pangu/preprocess.py": "tests/tools/test_preprocess_data.py",
    "pangu/supervise.py": "tests/tools/test_supervise.py",
    "pangu/train.py": "tests/cli/test_train.py",
    "pangu/train_tokenizer.py": "tests/tools/test_train_tokenizer.py",
    "pangu/calibration/calibrate_command.py": "tests/tools/test_plan_parallel.py",
    "pangu/calibration/measure_command.py": "tests/tools/test_plan_parallel.py",
    "pangu/planner/plan_command.py": "tests/tools/test_plan_parallel.py",
    "pangu/planner/tables.py": "tests/tools/test_plan_parallel.py",
    "pangu/planner/validate_command.py": "tests/tools/test_plan_parallel.py",
    # Benchmarks: started small, and their figures' form.
    "pangu/benchmarks/convert.py": "tests/tools/test_benchmark.py",
    "pangu/benchmarks/data.py": "tests/tools/test_benchmark_data.py",
    "pangu/benchmarks/generate.py": "tests/tools/test_benchmark.py",
    "pangu/benchmarks/growth.py": "tests/tools/test_benchmark_train.py",
    "pangu/benchmarks/layouts.py": "tests/tools/test_benchmark_train.py",
    "pangu/benchmarks/machine.py": "tests/tools/test_benchmark.py",
    "pangu/benchmarks/preprocess.py": "tests/tools/test_benchmark_data.py",
    "pangu/benchmarks/prose.py": "tests/tools/test_benchmark_data.py",
    "pangu/benchmarks/harness.py": "tests/tools/test_benchmark.py",
    "pangu/benchmarks/score.py": "tests/tools/test_benchmark.py",
    "pangu/benchmarks/startup.py": "tests/tools/test_benchmark_data.py",
    "pangu/benchmarks/tokenize.py": "tests/tools/test_benchmark_data.py",
    "pangu/benchmarks/train.py": "tests/tools/test_benchmark_train.py",
    "pangu/benchmarks/turns.py": "tests/tools/test_benchmark.py",
    "pangu/benchmarks/worker.py": "tests/tools/test_benchmark_train.py",
    "pangu/benchmarks/workers.py": "tests/tools/test_benchmark_train.py",
    "pangu/calibration/trial.py": "tests/pangu/calibration/test_measurement.py",
    # The configuration's files are tested as one: a YAML file goes in, a Config or a refusal comes out.
    "pangu/config/activations.py": "tests/pangu/model/test_numpy_reference.py",
    "pangu/config/foreign_names.py": "tests/pangu/config/test_config.py",
    "pangu/config/layout.py": "tests/pangu/config/test_config.py",
    "pangu/config/load.py": "tests/pangu/config/test_config.py",
    "pangu/config/parsing.py": "tests/pangu/config/test_config.py",
    "pangu/config/presets.py": "tests/pangu/config/test_sizes.py",
    "pangu/config/schema.py": "tests/pangu/config/test_config.py",
    "pangu/conversion/convert.py": "tests/cli/test_convert_checkpoint.py",
    "pangu/conversion/export.py": "tests/pangu/conversion/test_huggingface.py",
    "pangu/conversion/formats.py": "tests/cli/test_convert_checkpoint.py",
    "pangu/conversion/weights.py": "tests/pangu/conversion/test_load_weights.py",
    "pangu/engine/pipeline.py": "tests/distributed/test_layouts.py",
    "pangu/engine/preload.py": "tests/pangu/calibration/test_measurement.py",
    "pangu/engine/replicas.py": "tests/megatron_ext/supervision/test_replicas.py",
    "pangu/errors.py": "tests/cli/test_train.py",
    "pangu/evaluation/examples.py": "tests/pangu/evaluation/test_readers.py",
    "pangu/evaluation/progress.py": "tests/cli/test_evaluate.py",
    "pangu/evaluation/figures.py": "tests/pangu/evaluation/test_runner.py",
    "pangu/evaluation/tasks.py": "tests/pangu/evaluation/test_readers.py",
    "pangu/inference/loading.py": "tests/cli/test_generate.py",
    # The model's parts against a reference in numpy, whole.
    "pangu/model/block.py": "tests/pangu/model/test_numpy_reference.py",
    "pangu/model/embedding.py": "tests/pangu/model/test_numpy_reference.py",
    "pangu/model/model.py": "tests/pangu/model/test_numpy_reference.py",
    "pangu/model/query_layer.py": "tests/pangu/model/test_numpy_reference.py",
    "pangu/planner/plan.py": "tests/pangu/planner/test_memory.py",
    "pangu/planner/profile.py": "tests/pangu/planner/test_time.py",
    "pangu/planner/recipe.py": "tests/pangu/planner/test_search.py",
    "pangu/planner/reference.py": "tests/pangu/planner/test_validation.py",
    "pangu/planner/states.py": "tests/pangu/planner/test_memory.py",
    "pangu/quickstart/corpus.py": "tests/tools/test_make_quickstart_corpus.py",
    "pangu/quickstart/facts.py": "tests/tools/test_make_quickstart_corpus.py",
    "pangu/tensor_files/blocks.py": "tests/pangu/conversion/test_conversion_memory.py",
    "pangu/tensor_files/lazy_tensor.py": "tests/pangu/conversion/test_load_weights.py",
    "pangu/tensor_files/mindspore_file.py": "tests/pangu/conversion/test_mindspore.py",
    "pangu/tensor_files/safetensors_file.py": "tests/pangu/conversion/test_huggingface.py",
    "pangu/text/tokenizer_training.py": "tests/tools/test_train_tokenizer.py",
    "pangu/training/checkpoint.py": "tests/distributed/test_checkpoint.py",
    "pangu/training/curves.py": "tests/tools/test_plot_run.py",
}
"""Modules whose test has another name: the file that would fail first."""
SOURCES = read_tree(ROOT)
IMPORTS: dict[str, set[str]] = {}
for importer, _, imported in edges(SOURCES):
    IMPORTS.setdefault(importer, set()).add(imported)
MODULES = [path for path in SOURCES if path.startswith(("pangu/", "megatron_ext/")) and not path.endswith("__init__.py")]


def own_test(module: str) -> str:
    """The test of a module's name."""
    path = PurePosixPath(module)
    return str("tests" / path.parent / f"test_{path.name}")


def test_every_module_has_its_test_or_a_line() -> None:
    missing = [module for module in MODULES if own_test(module) not in SOURCES and module not in ELSEWHERE]
    assert not missing, f"write {own_test(missing[0])}, or say in ELSEWHERE where {missing[0]} is tested: {missing}"


def test_no_line_is_out_of_date() -> None:
    stale = [module for module in ELSEWHERE if module not in MODULES or own_test(module) in SOURCES]
    assert not stale, f"these are gone, or have a test of their own: {stale}"


def started(path: str) -> Iterator[str]:
    """Programs that a file names in a string of their own: pangu.train, train.py."""
    for node in ast.walk(SOURCES[path].tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield f"{node.value.replace('.', '/')}.py"
            yield f"tools/{PurePosixPath(node.value).name}"


def reached(test: str) -> set[str]:
    """Files that a test imports or starts, and that these import or start."""
    found, pending = set(), [test]
    while pending:
        path = pending.pop()
        if path in SOURCES and path not in found:
            found.add(path)
            pending += [*IMPORTS.get(path, ()), *started(path)]
    return found


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_what_a_line_names_reaches_the_module(test: str) -> None:
    assert Path(ROOT / test).is_file(), f"{test} is gone"
    claimed = {module for module, named in ELSEWHERE.items() if named == test}
    assert claimed <= reached(test), f"{test} reaches neither by imports nor by programs: {sorted(claimed - reached(test))}"
