"""The end of a job: how to load its output. What is printed there is run here, in the engine that it names."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

from jobs.cli.main import main
from jobs.report.loading import BY_ENGINE, ELSEWHERE, Loading, loading_lines
from loaders.layouts import ENGINES, LAYOUTS
from loaders.places import DEMO


def printed(out: str) -> str:
    """Return the code that a job's end shows."""
    lines = out[out.index("\nloaded by ") + 1 :].splitlines()[1:]
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def logits_of(model: Any) -> Any:
    import torch

    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def loaded(weightmill: Any, *arguments: str) -> Any:
    """Run a job and then what it prints; returns the model."""
    ran = weightmill("run", *arguments)
    assert ran.status == 0, ran.err
    space: dict[str, Any] = {}
    exec(printed(ran.out), space)  # what a user would paste
    return space["model"]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # which is what w4a16_asym wants
@pytest.mark.parametrize("quant", ["nf4", "int8", "w4a16", "w4a16_asym", "none"])
def test_what_is_printed_loads_the_output_in_transformers(quant: str, weightmill: Any) -> None:
    import torch
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(DEMO)
    model = loaded(weightmill, f"quant={quant}")
    assert torch.nn.functional.cosine_similarity(logits_of(model), logits_of(plain), dim=-1).mean() > 0.9


@pytest.mark.parametrize("quant", ["mxfp4a16", "nvfp4a16"])
def test_a_float32_model_in_fp4_is_loaded_in_bfloat16(quant: str, weightmill: Any) -> None:
    """transformers decompresses FP4 to bfloat16, which does not multiply with float32."""
    import torch

    assert weightmill("run", "quant=none", "quant.dtype=float32", "output.path=wide").status == 0
    model = loaded(weightmill, "model.path=wide", f"quant={quant}", "output.path=out")
    assert model.dtype == torch.bfloat16
    assert logits_of(model).isfinite().all()


def test_what_is_printed_loads_the_output_in_hqq(weightmill: Any) -> None:
    pytest.importorskip("hqq", reason="the engine is not installed")
    assert logits_of(loaded(weightmill, "quant=hqq4")).isfinite().all()


def test_what_is_printed_loads_the_output_in_mlx(weightmill: Any) -> None:
    pytest.importorskip("mlx_lm", reason="the engine is not installed")
    import mlx.core as mx

    model = loaded(weightmill, "quant=mlx_int4")
    assert bool(mx.isfinite(model(mx.array([[2, 3, 4]]))).all())


def test_what_is_printed_loads_the_output_in_llama_cpp(weightmill: Any) -> None:
    pytest.importorskip("llama_cpp", reason="the engine is not installed")
    model = loaded(weightmill, "quant=gguf_q8_0", "output.path=a folder's")
    assert model.n_vocab() == 1024


def test_it_is_named_from_where_one_stands(weightmill: Any, tmp_path: Path) -> None:
    ran = weightmill("run", "quant=nf4")
    assert 'from_pretrained("outputs/demo-nf4")' in ran.out
    assert "not loaded by mlx-lm, llama.cpp" in ran.out
    ran = weightmill("run", "quant=nf4", f"output.path={tmp_path / 'else'}")
    assert f'from_pretrained("{tmp_path / "else"}")' in ran.out


def test_a_sweep_names_the_folder_of_its_outputs_and_how_to_open_its_page(weightmill: Any) -> None:
    ran = weightmill("run", "-m", "quant=nf4,int8", "tracking=mlflow")
    assert ran.status == 0, ran.err
    assert f"outputs: {Path.cwd() / 'outputs'}; the README.md of each says how to load it" in ran.out
    assert "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db, and then http://127.0.0.1:5000" in ran.out
    assert "compare-runs" not in ran.out
    assert max(len(line) for line in ran.out.splitlines() if "mlflow ui" in line) < 200


def test_a_run_says_how_to_open_its_page(weightmill: Any) -> None:
    ran = weightmill("run", "quant=nf4", "tracking=mlflow")
    assert "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db" in ran.out
    run = re.search(r"^run: .* run (\w+)$", ran.out, re.MULTILINE)
    assert run is not None
    page = f"  http://127.0.0.1:5000/#/experiments/1/runs/{run[1]}?workflowType=machine_learning"
    assert page in ran.out.splitlines()
    assert max(len(line) for line in ran.out.splitlines() if "mlflow ui" in line or "http" in line) < 200


@pytest.mark.quick
def test_every_engine_and_layout_says_who_loads_it() -> None:
    assert {*BY_ENGINE} == {name for name, engine in ENGINES.items() if engine.layout == "hf"} | {"hqq"}
    assert {*ELSEWHERE} == {*LAYOUTS} - {"hf"}


@pytest.mark.quick
def test_the_help_of_a_choice_says_who_loads_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "quant=hqq4", "quant=mlx_int4", "quant=gguf_q4_k_m", "quant=w4a16", "output=packed"]) == 0
    said = capsys.readouterr().out
    for who in ("hqq", "mlx-lm", "llama.cpp", "vLLM, and transformers", "moeflux"):
        assert f"loaded by: {who}" in said
    assert "not by: transformers, vLLM, llama.cpp" in said


def test_of_a_split_gguf_the_first_part_is_loaded(weightmill: Any, tmp_path: Path) -> None:
    ran = weightmill(
        "run", "quant=gguf_q8_0", "output.split=true", "unit_mb=0.5", f"output.path={tmp_path / 'out'}", "format=text"
    )
    assert ran.status == 0, ran.err
    first = min(path.name for path in (tmp_path / "out").glob("*.gguf"))
    assert "-00001-of-" in first
    assert f"/{first} -p Hello" in ran.out


@pytest.mark.quick
def test_code_is_one_line_however_narrow_the_terminal_is() -> None:
    code = f'model = AutoModel.from_pretrained("{"a-long/path" * 12}")'
    shown = StringIO()
    narrow = Console(width=40, file=shown, force_terminal=True, color_system=None)
    narrow.print(Group(*loading_lines(Loading("transformers", None, code=code))), crop=False)
    assert f"    {code}\n" in shown.getvalue()
