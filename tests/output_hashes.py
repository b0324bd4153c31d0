"""The hash of every scheme's output on the demo, to be compared before and after a change that must not change a byte.

    python -m tests.output_hashes FOLDER [--keep]

prints one line per output: the hash of all its files except weightmill.json (which has times and paths), README.md
and report.html (which are prose about them), and the hash of weightmill.json's data without what may differ from run to
run. FOLDER keeps the reports as `NAME.json`, so that two runs can be compared key by key.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.places import ROOT

REPORT, CARD, PAGE = "weightmill.json", "README.md", "report.html"
VOLATILE = ("format", "run", "versions", "damage")  # the damage is a sum of what else stands there
FURTHER = {  # settings that change which code writes: name -> arguments
    "nf4-double": ["quant=nf4", "quant.double_quant=true"],
    "nf4-g128": ["quant=nf4", "quant.group_size=128"],
    "nf4-f32": ["quant=nf4", "quant.storage_dtype=float32"],
    "hqq4-hf": ["quant=hqq4", "output=hf"],
    "hqq4-axis0": ["quant=hqq4", "quant.axis=0"],
    "mlx4-packed": ["quant=mlx_int4", "output=packed"],
    "none-packed": ["quant=none", "output=packed"],
    "none-mlx": ["quant=none", "output=mlx"],
    "none-gguf": ["quant=none", "output=gguf"],
    "none-f16": ["quant=none", "quant.dtype=float16"],
    "none-pytorch": ["quant=none", "output.container=pytorch"],
    "q4_k_m-split": ["quant=gguf_q4_k_m", "output.split=true"],
    "nf4-expanded": ["quant=nf4", "transform=block_expansion", "transform.num_blocks=3"],
    "auto-mlx": ["quant=auto", "quant.engine=mlx", "quant.target_bits=4.25"],
    "auto-gguf": ["quant=auto", "quant.engine=gguf", "quant.target_bits=5"],
    "nf4-rules": ["quant=nf4", "rules=[{action: keep, name: 'layers\\.0\\.'}, {action: quantize, name: down_proj, quant: {group_size: 32}}]"],  # noqa: E501
}  # fmt: skip


def jobs(work: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the names and arguments of all jobs."""
    for preset in sorted(path.stem for path in (ROOT / "conf" / "quant").glob("*.yaml")):
        if preset != "auto":
            yield preset, [f"quant={preset}"]
    yield from FURTHER.items()
    for source in ("gguf_q4_k_m", "w4a16", "mlx_int4", "none-pytorch"):  # from quantized and other containers
        yield f"from-{source}", [f"model.path={work / source}", "quant=nf4"]


def hash_folder(folder: Path) -> str:
    """Return the hash of the names and bytes of all files except the report and the card."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (REPORT, CARD)):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def report_data(folder: Path, work: Path) -> Any:
    """Return the report's data without what may differ from run to run."""
    document = json.loads((folder / REPORT).read_text().replace(str(work), "WORK").replace(str(ROOT), "ROOT"))
    document["aux"].pop(CARD, None)
    return {key: value for key, value in document.items() if key not in VOLATILE}


def main(folder: str, *options: str) -> int:
    """Run all jobs and print their outputs' hashes; returns the number of jobs that failed."""
    work, failed = Path(folder).resolve(), 0
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "jobs" / "demo", source, ignore=shutil.ignore_patterns("README.md"))  # it is prose
    for name, arguments in jobs(work):
        output = work / name
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "jobs.run", f"output.path={output}", "tracking=none", "cluster=local"]
        command += [] if any(each.startswith("model.path=") for each in arguments) else [f"model.path={source}"]
        made = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        if made.returncode:
            failed += 1
            print(f"{name:16} failed: {(made.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
            continue
        data = report_data(output, work)
        (work / f"{name}.json").write_text(json.dumps(data, indent=1, sort_keys=True))
        short = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
        print(f"{name:16} {hash_folder(output)} {short}", flush=True)
    if "--keep" not in options:
        shutil.rmtree(source)
        for name, _ in jobs(work):
            shutil.rmtree(work / name, ignore_errors=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
