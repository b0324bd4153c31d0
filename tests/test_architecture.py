"""The shape of the code: imports point one way, and some libraries enter by one file each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for folder in ("jobs", "loaders") for p in (ROOT / folder).rglob("*.py") if "demo/" not in str(p))

# Each may import from itself and from those after it.
LAYERS = [
    ("entries", ("jobs.__main__", "jobs.cli", "jobs.run", "jobs.plan", "jobs.verify", "jobs.lint", "jobs.inspect",
                 "jobs.diff", "jobs.clean", "jobs.bench", "jobs.compare", "jobs.recommend")),
    ("sweeps", ("jobs.sweeping", "jobs.comparing")),
    ("flows", ("jobs.running", "jobs.passing", "jobs.verifying", "jobs.differing", "jobs.benching", "jobs.benches",
               "jobs.budgeting")),
    ("mixing", ("jobs.mixing",)),
    ("preparing", ("jobs.preparing", "jobs.judging")),
    ("console", ("jobs.console", "jobs.help", "jobs.compose", "jobs.checking", "jobs.refusing", "jobs.report",
                 "jobs.comparison", "jobs.metrics",
                 "jobs.plots", "jobs.mix_plot", "jobs.tracking", "jobs.tracked", "jobs.publish",
                 "jobs.progress")),
    ("execution", ("jobs.clusters", "jobs.execution", "jobs.ray_cluster")),
    ("unit", ("jobs.joining", "jobs.merging", "jobs.unit", "jobs.parts", "jobs.journal", "jobs.measuring")),
    ("planning", ("jobs.planning", "jobs.targets", "jobs.warning", "jobs.spec", "jobs.strategies", "jobs.strict")),
    ("library", ("loaders.loading", "loaders.recommending")),
    ("lint", ("loaders.lint",)),
    ("models", ("loaders.models",)),
    ("loaders' flows", ("loaders.layouts", "loaders.views", "loaders.work", "loaders.encoding",
                        "loaders.encoded")),
    ("presets", ("loaders.auto_quant", "loaders.quants", "loaders.presets", "loaders.load_config")),
    ("rules", ("loaders.rules", "loaders.mixes")),
    ("expansion", ("loaders.expansion",)),
    ("sources", ("loaders.sources",)),
    ("decoding", ("loaders.decoding",)),
    ("recipes", ("loaders.recipes", "loaders.stacks")),
    ("strategies", ("loaders.strategies", "loaders.shared", "loaders.cache", "loaders.formats")),
    ("checkpoints", ("loaders.checkpoint", "loaders.families", "loaders.mlx_models", "loaders.mlx_config",
                     "loaders.architectures")),
    ("schemes", ("loaders.quantization", "loaders.backends", "loaders.containers",
                 "loaders.stats")),
    ("ground", ("loaders.storage", "loaders.specs", "loaders.errors", "loaders.atomic", "loaders.integrity",
                "loaders.memory", "loaders.scratch", "loaders.checking", "loaders.choosing", "loaders.strict")),
]  # fmt: skip
ENTER_BY = {"hydra": ["jobs/compose.py"], "ray": ["jobs/ray_cluster.py"], "mlflow": ["jobs/tracking.py"]}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int | None:
    best = [
        (len(prefix), index)
        for index, (_, prefixes) in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(best)[1] if best else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = layer_of(module_of(path))
    if path.name in ("__init__.py", "train_demo.py") and here is None:
        return
    assert here is not None, f"{path} belongs to no layer"
    for name in imports_of(path):
        there = layer_of(name)
        if name.startswith(("jobs", "loaders")) and there is not None:
            assert there >= here, f"{module_of(path)} ({LAYERS[here][0]}) imports {name} ({LAYERS[there][0]})"


@pytest.mark.parametrize("library", sorted(ENTER_BY))
def test_a_library_enters_by_one_file(library: str) -> None:
    using = [
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == library or name.startswith(library + ".") for name in imports_of(path))
    ]
    assert using == ENTER_BY[library]


def test_the_library_knows_nothing_of_jobs() -> None:
    for path in FILES:
        if "loaders" in path.parts:
            assert not {n for n in imports_of(path) if n.split(".")[0] in ("jobs", "ray", "mlflow", "hydra")}, path


def test_a_job_on_the_cpu_imports_neither_torch_nor_ray_nor_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from jobs.cli import main; status = main(sys.argv[1:]);"
        "print(sorted(m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules)); sys.exit(status)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "run", "tracking=none", "cluster=local", f"output.path={tmp_path / 'out'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


def test_no_file_is_about_more_than_one_thing() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 420, f"{path}: split it"
