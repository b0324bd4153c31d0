"""Tests of the structure: imports go from upper to lower layers, and some libraries enter by few files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.main import VERBS
from loaders.places import ROOT

pytestmark = pytest.mark.quick

FILES = sorted(
    p for folder in ("jobs", "loaders", "weightmill") for p in (ROOT / folder).rglob("*.py") if "demo/" not in str(p)
)

# The layers from top to bottom. A module may import from its own folder and from the lines below. A word is a folder,
# or a file at the top of `jobs` or `loaders`.
JOBS = """
__main__ bench clean compare diff inspect lint list plan recommend run status track verify
benchmarks
orchestration
tracking
verification mixed_precision
report execution
output
planning
cli
spec
"""
LOADERS = """
models
loading lint
layouts presets
rules
tensors
strategies
checkpoints backends imatrix
architectures containers quantization
specs stats clock progress
storage dtypes
patterns
limits faults missing
errors places words tables near_misses
"""
LAYERS = [
    *([f"jobs.{word}" for word in line.split()] for line in JOBS.strip().splitlines()),
    *([f"loaders.{word}" for word in line.split()] for line in LOADERS.strip().splitlines()),
]
ENTER_BY = {
    "hydra": ["jobs/cli/compose.py", "jobs/cli/multirun.py"],
    "ray": [f"jobs/execution/ray/{name}.py" for name in ("fitting", "nodes", "placement", "start")],
    "mlflow": ["jobs/tracking/mlflow_run.py"],
    "huggingface_hub": [
        "loaders/models/hub_cache.py",
        "loaders/storage/hub/branch.py",
        "loaders/storage/hub/cache.py",
        "loaders/storage/hub/client.py",
    ],
    "obstore": [f"loaders/storage/objects/{name}.py" for name in ("answers", "client", "services")],
    "botocore": ["loaders/storage/objects/parts.py", "loaders/storage/objects/services.py"],
    "azure": ["loaders/storage/objects/parts.py"],
}


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


def room_of(module: str) -> str:
    """Return the folder of a module: jobs.cli for jobs.cli.verb."""
    return ".".join(module.split(".")[:2])


def layer_of(module: str) -> int | None:
    return next((index for index, rooms in enumerate(LAYERS) if room_of(module) in rooms), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    if module in ("jobs", "loaders") or path.parent.name == "weightmill":
        return
    here = layer_of(module)
    assert here is not None, f"{path} belongs to no layer: name its folder, or its file, in JOBS or LOADERS above"
    for name in imports_of(path):
        there = layer_of(name)
        if there is not None and room_of(name) != room_of(module):
            assert there > here, f"{module} imports {name}, which is in no layer below: see JOBS and LOADERS above"


@pytest.mark.parametrize("library", sorted(ENTER_BY))
def test_a_library_enters_by_few_files(library: str) -> None:
    using = [
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == library or name.startswith(library + ".") for name in imports_of(path))
    ]
    assert using == ENTER_BY[library]


def test_the_package_is_on_top_of_all_others() -> None:
    for path in FILES:
        if path.parent.name != "weightmill":
            assert not {n for n in imports_of(path) if n.split(".")[0] == "weightmill"}, path


def test_the_library_knows_nothing_of_jobs() -> None:
    for path in FILES:
        if "loaders" in path.parts:
            assert not {n for n in imports_of(path) if n.split(".")[0] in ("jobs", "ray", "mlflow", "hydra")}, path


# What neither a plan nor a help page needs: a compiler, engines, clusters, tracking and plots.
SLOW = ("numba", "llvmlite", "torch", "transformers", "mlflow", "ray", "matplotlib", "scipy", "pandas", "sqlalchemy")


def imported_by(folder: Path, *arguments: str) -> set[str]:
    """Run a verb in a process of its own and return the modules that it had imported at its end."""
    code = (
        "import sys; from jobs.cli.main import main; status = main(sys.argv[1:]);"
        "print('modules', *sorted(sys.modules)); sys.exit(status)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("quant", ["nf4", "w4a16_asym", "mxfp4", "hqq4", "mlx_nvfp4", "gguf_q4_k_m", "ternary", "none"])
def test_a_plan_imports_no_kernels(quant: str, tmp_path: Path) -> None:
    assert not imported_by(tmp_path, "plan", f"quant={quant}") & {*SLOW}


def test_a_job_on_the_cpu_imports_no_engine_and_no_kernels_but_its_own(tmp_path: Path) -> None:
    """Each kernel is compiled by the first job that needs it."""
    found = imported_by(tmp_path, "run", "quant=nf4", "tracking=none", "cluster=local")
    assert not found & {"torch", "ray", "mlflow", "transformers"}
    kernels = "loaders.quantization.kernels"
    others = (f"{kernels}.{name}" for name in ("compressed_tensors.fp8", "ggml", "hqq", "mlx", "rounding", "read_only"))
    assert not found & {*others}
    assert f"{kernels}.bitsandbytes.fourbit" in found


@pytest.mark.parametrize("verb", [*VERBS, "--help"])
def test_help_imports_little(verb: str, tmp_path: Path) -> None:
    """Neither what composes and shows a request, nor what acts on it: it tells settings apart, and that is all."""
    found = imported_by(tmp_path, *dict.fromkeys((verb, "--help")))
    acting = {"hydra", "omegaconf", "rich", "loaders.checkpoints", "loaders.strategies", "loaders.layouts"}
    assert not found & {*SLOW, *acting}


def test_no_file_is_about_more_than_one_thing() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 420, f"{path}: split it"


# --- code that comes with a checkpoint

# What loads a model, a tokenizer or pickles from a folder, in transformers, tokenizers, mlx-lm, hqq and torch.
METHODS = {"from_pretrained", "from_quantized", "from_config", "load_model", "load_tokenizer"}
LOADING = {
    "get_class_from_dynamic_module", "torch.load", "pickle.load", "pickle.loads", "Tokenizer.from_file", "mlx_lm.load",
    "exec", "eval",
}  # fmt: skip
# Who may, with the reason.
MAY_LOAD = {
    "loaders/models/foreign.py": "it is the way for all others",
    "jobs/benchmarks/train_demo.py": "it reads back what it has just saved",
    "loaders/lint/engines/diffusers.py": "a class of diffusers itself, of a config without files",
}


def test_libraries_load_folders_in_one_way() -> None:
    """A bare call would ask on standard input whether a checkpoint's code may run, or run it."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in LOADING or called.rpartition(".")[2] in METHODS:
                found.add(str(path.relative_to(ROOT)))
    assert found == {*MAY_LOAD}, "go through loaders/models/foreign.py"


# --- where paths are opened

OPENING = {
    "exists", "is_file", "is_dir", "is_symlink", "stat", "lstat", "iterdir", "glob", "rglob", "read_text", "read_bytes",
    "write_text", "write_bytes", "mkdir", "rmdir", "touch", "unlink", "rename", "symlink_to", "hardlink_to", "resolve",
    "open", "walk", "scandir", "listdir",
}  # fmt: skip
OPENING_ALONE = {"open", "write_file", "hash_file"}
# The other files that open local paths, each with the reason why these are no files of a checkpoint, output or journal.
OPENS_PATHS = {
    "jobs/benchmarks/": "what is timed are this machine's files",
    "jobs/cli/choices.py": "conf/, and choices that a person keeps in files",
    "jobs/cli/compose.py": "conf/, and choices that a person keeps in files",
    "jobs/cli/console.py": "/dev/null",
    "jobs/cli/help.py": "conf/",
    "jobs/cli/home.py": "a home and a temporary folder for libraries",
    "jobs/cli/rules_file.py": "rules that a person keeps in a file",
    "jobs/cli/sweep_folders.py": "folders of sweeps, which hold a copy of the request",
    "jobs/execution/ray/own.py": "Ray's own folder and its logs",
    "jobs/execution/ray/processes.py": "/proc, and Ray's own folder",
    "jobs/execution/ray/worker.py": "/proc",
    "jobs/mixed_precision/candidate_errors.py": "what was measured here, for the next budget",
    "jobs/mixed_precision/search.py": "a calibration text of a person's",
    "jobs/output/former_root.py": "the folder of outputs that earlier versions made",
    "jobs/orchestration/compare.py": "a comparison, written for a person",
    "jobs/orchestration/sweep.py": "a sweep's page, written for a person",
    "jobs/report/command.py": "conf/",
    "jobs/tracking/": "MLflow's database and files, and .git",
    "jobs/verification/logits.py": "a text of a person's",
    "jobs/verification/output.py": "numbers of an output that an engine has read from its folder",
    "loaders/architectures/family_files.py": "the package's own files of families",
    "loaders/backends/machine.py": "/proc and /sys",
    "loaders/backends/memory.py": "/proc",
    "loaders/containers/read_back.py": "parts, which are made here before their destination has them",
    "loaders/containers/writer.py": "parts, which are made here before their destination has them",
    "loaders/loading/cache.py": "the cache of loads, a folder of this machine",
    "loaders/models/evaluating.py": "logits that are kept here, and files for a library that reads folders",
    "loaders/models/foreign.py": "configs in folders that libraries read",
    "loaders/models/hub_cache.py": "huggingface_hub's cache",
    "loaders/models/mlx_modules.py": "files for a library that reads folders",
    "loaders/models/sensitivity.py": "what was measured here",
    "loaders/models/small_files.py": "small files, fetched for a library that reads folders",
    "loaders/tables.py": "tables of the package's own",
    "loaders/places.py": "where weightmill itself lies",
    "loaders/presets/catalog.py": "conf/",
    "loaders/stats.py": "statistics, saved for a person",
    "loaders/quantization/kernels/lanes.py": "the kernels' own files",
    "loaders/strategies/": "maps and reads of local files, and scratch for those of other stores",
}


def opens_paths(path: Path) -> bool:
    """Whether a file calls functions that open, list or change paths: methods of Path, functions of os, or open."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in OPENING_ALONE:
                return True
            if isinstance(called, ast.Attribute) and called.attr in OPENING:
                is_a_store_s = called.attr == "open" and node.args and not isinstance(node.args[0], ast.Constant)
                if not is_a_store_s or ast.unparse(called.value) == "os":
                    return True
    return False


def test_stores_alone_open_paths() -> None:
    """Only stores open paths of checkpoints, outputs and journals; otherwise these could be in local folders only."""
    opening = {str(path.relative_to(ROOT)) for path in FILES if opens_paths(path)}
    others = {name for name in opening if not name.startswith(("loaders/storage/", *OPENS_PATHS))}
    assert not others, "go through a Store or a Destination of loaders/storage"
    unused = [each for each in OPENS_PATHS if not any(name.startswith(each) for name in opening)]
    assert not unused


# --- messages

KEY = re.compile(
    r"\b(?:output|verify|quant|model|source|transform|cluster|tracking)\.[a-z_]+(?:[:=]| is\b)"
    r"|\b(?:quant|output|verify)=\w"
)
NAMES_OF_TENSORS = re.compile(r"model\.(?:layers|embed_tokens|norm|safetensors)|output\.weight|tokenizer\.model")


def test_the_library_names_no_key_of_a_job() -> None:
    """Its own users know no `output.layout`: a program says what it calls settings (`loaders.errors.setting`)."""
    for path in FILES:
        if "loaders" not in path.parts:
            continue
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found = KEY.search(NAMES_OF_TENSORS.sub("", node.value))
                assert found is None, f"{path}:{node.lineno}: {node.value}"


def test_settings_of_the_library_are_keys_of_a_job() -> None:
    from jobs.cli.validation import fields_of
    from jobs.spec.job import JobSpec
    from jobs.spec.keys import KEYS

    known = {place for place, _ in fields_of(JobSpec)}
    assert {key for key in KEYS.values() if "=" not in key} <= known


# --- records


def test_large_records_take_keywords() -> None:
    """Of six values in a row nobody sees which is which."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                made_by = [each for each in node.decorator_list if "frozen=True" in ast.unparse(each)]
                fields = [
                    each
                    for each in node.body
                    if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation)
                ]
                if made_by and len(fields) > 5:
                    assert "kw_only=True" in ast.unparse(made_by[0]), f"{path}: {node.name}"
