"""The recipes of deploy/ and docs/clusters.md: their commands are planned, their files agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli.validation import fields_of
from jobs.spec.job import JobSpec
from loaders.places import DEMO, ROOT

DEPLOY = ROOT / "deploy"
FILES = [*(path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and "__pycache__" not in path.parts),
         ROOT / "docs" / "clusters.md"]  # fmt: skip
RAYJOB = DEPLOY / "kubernetes" / "rayjob.yaml"
DOCKERFILE = DEPLOY / "kubernetes" / "Dockerfile"
# What runs a job takes the job's settings; a backslash or a comment's sign may stand between them.
COMMAND = re.compile(r"(?:weightmill (?:run|plan)|jobs\.(?:run|plan)|job\.sbatch)((?:[ \n#\\]+[\w.]+=[^\s\"'`]+)+)")
SETTING = re.compile(r"\b(?:cluster|store|output|tracking|backend|model|strategy|verify)\.[a-z_]+(?==)")


def commands() -> dict[str, list[str]]:
    """The settings of each command, by where it stands."""
    found = {}
    for path in FILES:
        text = path.read_text()
        for match in COMMAND.finditer(text):
            words = [
                word
                for word in re.sub(r"[\\#]", " ", match[1]).replace("{address}", "10.0.0.1:6379").split()
                if "..." not in word
            ]
            if words:
                found[f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start(1)) + 1}"] = words
    return found


@pytest.mark.quick
@pytest.mark.parametrize("where", commands())
def test_a_command_can_be_planned(where: str, weightmill: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    given = [word for word in commands()[where] if not word.startswith(("model=", "model.path=", "output."))]
    ran = weightmill("plan", *given, f"model.path={DEMO}", f"output.path={tmp_path / 'out'}", "tracking=none")
    assert ran.status == 0, f"{where}: {ran.err}"


@pytest.mark.quick
def test_commands_are_found_in_every_recipe() -> None:
    found = {where.rpartition(":")[0] for where in commands()}
    assert found >= {"deploy/kubernetes/rayjob.yaml", "deploy/slurm/job.sbatch", "docs/clusters.md"}


@pytest.mark.quick
def test_settings_that_are_named_are_there() -> None:
    known = {place for place, _ in fields_of(JobSpec)}
    named = {(setting, path.name) for path in FILES for setting in SETTING.findall(path.read_text())}
    assert {(setting, name) for setting, name in named if setting not in known} == set()
    assert ("cluster.address", "job.sbatch") in named


def shell_scripts() -> list[Path]:
    return [path for path in FILES if path.read_text().startswith("#!/usr/bin/env bash")]


@pytest.mark.quick
def test_shell_scripts_are_sound() -> None:
    for script in shell_scripts():
        ran = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    ran = subprocess.run(["shellcheck", *shell_scripts()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


# --- Kubernetes


def gigabytes(size: str) -> float:
    factor = {"Gi": 1 << 30, "Mi": 1 << 20}.get(size[-2:], 1)
    return float(size.rstrip("GMi")) * factor / 1e9


@pytest.fixture
def job() -> dict[str, Any]:
    found = yaml.safe_load(RAYJOB.read_text())
    assert isinstance(found, dict)
    return found["spec"]


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.quick
def test_a_pod_writes_to_its_volumes_alone_and_has_no_rights(job: dict[str, Any]) -> None:
    environment = dict(re.findall(r"(\w+)=(\S+)", re.search(r"^ENV (.*)$", DOCKERFILE.read_text(), re.MULTILINE)[1]))  # type: ignore[index]
    for group in groups(job):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {*mounts.values()} == {volume["name"] for volume in pod["volumes"]}
        assert environment["HOME"] in mounts
        words = job["entrypoint"].split()
        for setting in ("model.path=", "output.path="):
            [path] = [word.removeprefix(setting) for word in words if word.startswith(setting)]
            assert path.startswith(tuple(f"{each}/" for each in mounts))


@pytest.mark.quick
def test_ray_is_told_what_a_pod_has(job: dict[str, Any]) -> None:
    for group in groups(job):
        [container] = group["template"]["spec"]["containers"]
        limits, told = container["resources"]["limits"], group["rayStartParams"]
        [shared] = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if "Memory" in str(v.get("emptyDir"))]
        store = int(told["object-store-memory"]) / 1e9
        assert store < gigabytes(shared["sizeLimit"])
        if told["num-cpus"] != "0":  # the head does no units
            assert told["num-cpus"] == limits["cpu"]
            assert int(told["memory"]) / 1e9 + store + 1 < gigabytes(limits["memory"])
        assert told.get("num-gpus") == limits.get("nvidia.com/gpu")


@pytest.mark.quick
def test_the_image_and_the_job_have_the_same_ray_and_a_python_that_is_supported(job: dict[str, Any]) -> None:
    [pinned] = re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert job["rayClusterSpec"]["rayVersion"] == pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = DOCKERFILE.read_text()
    [python] = re.findall(r"^FROM python:3\.(\d+)", image, re.MULTILINE)
    assert 11 <= int(python) < 15
    assert project["requires-python"] == ">=3.11,<3.15"
    [extras] = re.findall(r"/source\[([\w,]+)\]", image)
    assert {*extras.split(",")} <= {*project["optional-dependencies"]}
    # KubeRay hands the entry point to a shell.
    assert re.fullmatch(r"[\w./=:@ -]+", job["entrypoint"])


# --- ray job submit


@pytest.mark.quick
def test_what_is_sent_has_the_code_and_not_the_rest() -> None:
    found = yaml.safe_load((DEPLOY / "ray-job" / "runtime_env.yaml").read_text())
    assert {"tests", "docs"} <= {*found["excludes"]}
    assert not {"conf", "jobs", "loaders", "hydra_plugins", "weightmill"} & {*found["excludes"]}
    inside = yaml.safe_load(yaml.safe_load(RAYJOB.read_text())["spec"]["runtimeEnvYAML"])
    assert inside["env_vars"] == found["env_vars"]


# --- Ray's settings


@pytest.mark.quick
def test_recipes_and_page_have_the_same_health_checks_and_no_keepalive() -> None:
    """Short keepalives of gRPC end healthy workers after some minutes."""
    setting = re.compile(r"RAY_health_check_(\w+?)_?(?:ms)?(?:=|\W+(?:value\W+)?)(\d+)")
    found = {path.name: dict(setting.findall(path.read_text())) for path in FILES}
    wanted = {"period": "3000", "timeout": "5000", "failure_threshold": "3"}
    assert {name: each for name, each in found.items() if each} == dict.fromkeys(
        ("cluster", "job.sbatch", "rayjob.yaml", "clusters.md"), wanted
    )
    assert [path.name for path in FILES if "keepalive" in path.read_text()] == ["clusters.md"]
