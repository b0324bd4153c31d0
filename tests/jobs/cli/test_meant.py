"""What people type who know other tools: each is refused in a line that says what to type here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.compose import choices_of, compose, take_apart
from jobs.cli.main import VERBS, main
from jobs.cli.meant import KEYS_ELSEWHERE, OPTIONS, VERBS_ELSEWHERE
from jobs.cli.validation import fields_of
from jobs.spec.job import JobSpec
from loaders.errors import BadSpec
from loaders.near_misses import ELSEWHERE, MEANT, WITHOUT, plain

# Words of pydantic's and of Hydra's own, which mean nothing to who typed a setting.
INNER = re.compile(
    r"input should|input tag|discriminator|valid (?:string|integer|boolean|number|array|dictionary)|\.str\b|\.bool\b|"
    r"tuple\[|function-|Could not find|Could not load|Config search path|provider=|pydantic",
    re.IGNORECASE,
)


def problems_of(line: str, verb: str = "run") -> str:
    with pytest.raises(BadSpec) as caught:
        compose(verb, JobSpec, take_apart(verb, JobSpec, shlex.split(line)))
    said = "\n".join(caught.value.problems)
    assert not INNER.search(said), said
    return said


@pytest.mark.quick
def test_a_sweep_in_brackets_is_told_how_it_is_written() -> None:
    assert "write quant=nf4,hqq4" in problems_of("-m quant=[nf4,hqq4]")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "said"),
    [
        # choices
        ("quant=NF4", "quant: unknown choice 'NF4'; did you mean 'nf4'?"),
        ("quant=q4_k_m", "did you mean 'gguf_q4_k_m'?"),
        ("quant=Q8_0", "did you mean 'gguf_q8_0'?"),
        ("quant=MXFP4_MOE", "give quant=gguf_q4_k_m quant.file_type=MXFP4_MOE"),
        ("quant=gptq", "read here and not written; w4a16"),
        ("quant=AWQ", "read here and not written; w4a16"),
        ("quant=IQ2_XS", "needs calibration data"),
        ("quant=exl2", "neither read nor written"),
        ("quant=int4", "nf4 (transformers), w4a16 (vLLM)"),
        ("quant=bfloat16", "it is a cast: quant=none quant.dtype=bfloat16"),
        ("quant=bf16", "quant=none quant.dtype=bfloat16"),
        ("output=safetensors", "; give output.container=safetensors, or output=hf"),
        ("output=zzz", "a folder is given by output.path=zzz"),
        ("dtype=bfloat16", "did you mean 'output.dtype'?"),
        ("quant=none dtype=bfloat16", "did you mean 'quant.dtype'?"),
        ("output.shard_size=1", "did you mean 'output.max_shard_size'?"),
        ("quant=bitsandbytes", "did you mean 'nf4'?"),
        ("quant=FP8_DYNAMIC", "did you mean 'fp8_dynamic'?"),
        ("quant=nvfp4", "did you mean 'nvfp4a16'?"),
        ("quant=mlx", "did you mean 'mlx_int4'?"),
        ("quant=", "expected a choice after quant="),
        ("quant=nf4,fp4", "a sweep takes several: weightmill run -m quant=nf4,fp4"),
        ("quant=[nf4,fp4]", "expected one choice"),
        ("backend=gpu", "did you mean 'cuda'?"),
        ("backend=Metal", "did you mean 'mps'?"),
        ("strategy=mmap", "did you mean 'lazy'?"),
        ("output=mlx-lm", "did you mean 'mlx'?"),
        ("source=bin", "did you mean 'pytorch'?"),
        ("transform=lora", "did you mean 'merge_lora'?"),
        ("tracking=off", "did you mean 'none'?"),
        ("verify=ppl", "did you mean 'logits'?"),
        ("cluster=Ray", "did you mean 'ray'?"),
        ("model=LLaMA-70B", "did you mean 'llama70b'?"),
        ("model=./my/model", "give model.path=./my/model"),
        ("model=meta-llama/Llama-3.1-8B", "give model.path=meta-llama/Llama-3.1-8B"),
        ("output=out", "a folder is given by output.path=out"),
        ("output=/tmp/out", "give output.path=/tmp/out"),
        ("tracking=http://host:5000", "give tracking.uri=http://host:5000"),
        ("cluster=ray://host:10001", "give cluster.address=ray://host:10001"),
        ("transform=./adapter", "give transform.path=./adapter"),
        # keys
        ("group_size=64", "did you mean 'quant.group_size'?"),
        ("torch_dtype=float16", "did you mean 'output.dtype'?"),
        ("model_path=x", "did you mean 'model.path'?"),
        ("output_dir=x", "did you mean 'output.path'?"),
        ("quantization=nf4", "did you mean 'quant'?"),
        ("trust_remote_code=true", "code in a checkpoint is never run"),
        ("quant.wbits=4", "quant.wbits: unknown key"),
        ("quant.bits=4", "it belongs to quant=hqq2|hqq3|hqq4|hqq8|mlx_int4"),
        ("quant.blocksize=64", "did you mean 'quant.group_size'?"),
        ("quant.compress_statistics=true", "did you mean 'quant.double_quant'?"),
        ("quant=int8 quant.group_size=64", "hqq8|mlx_int4|mlx_int8|mlx_mixed_4_6|nf4|w4a16|w4a16_asym|w8a16;"),
        ("strategy.memory_budget_mb=64", "it belongs to strategy=remote|streaming"),
        ("verify.tokens=64", "it belongs to verify=embeddings|logits"),
        ("output.pth=x", "did you mean 'output.path'?"),
        ("tracking.url=x", "did you mean 'tracking.uri'?"),
        ("cluster.num_workers=4", "did you mean 'cluster.threads'?"),
        ("model.token=x", "set HF_TOKEN in the environment"),
        ("quant.kind=nf4", "quant=NAME chooses one"),
        ("~quant.kind", "quant=NAME chooses one"),
        # values
        ("quant.compute_dtype=bf16", "did you mean 'bfloat16'?"),
        ("quant.compute_dtype=torch.float16", "did you mean 'float16'?"),
        ("quant.compute_dtype=None", "give quant.compute_dtype=null"),
        ("quant.storage_dtype=bf16", "did you mean 'bfloat16'?"),
        ("quant.double_quant=yes", "give quant.double_quant=true"),
        ("quant.group_size=128.0", "give quant.group_size=128"),
        ("quant.group_size=abc", "expected a whole number; found"),
        ("quant=gguf_q4_k_m quant.file_type=q4_k_s", "did you mean 'Q4_K_S'?"),
        ("quant=hqq4 quant.bits=5", "expected 8, 4, 3, 2 or 1"),
        ("quant=auto quant.target_bits=4 quant.engine=llama.cpp", "did you mean 'gguf'?"),
        ("unit_mb=1GB", "give unit_mb=1000"),
        ("verify.max_relative_error=1%", "give verify.max_relative_error=0.01"),
        ("verify=logits verify.tokens=1e4", "give verify.tokens=10000"),
        ("cluster.threads=all", "give cluster.threads=null"),
        ("output.split=on", "give output.split=true"),
        ("format=JSON", "did you mean 'json'?"),
        ("lint=ignore", "did you mean 'warn'?"),
        ("mtp=skip", "did you mean 'keep'?"),
        ("objective=kl", "objective: expected a list, such as 'objective=[error/relative]'"),
        ("model.revision=12e4567", "quote it twice"),
        ("model.name=5", "quote it twice"),
        ("output.max_shard_size=10", "output.max_shard_size: expected a size such as 5GB or 512MiB; found 10"),
        ("output.max_shard_size=10M", 'output.max_shard_size: expected a size such as 5GB or 512MiB; found "10M"'),
        ("rules=keep", "expected a list, such as 'rules=[{action: keep"),
        ("'rules=[keep]'", "rules[0]: expected"),
        ("'rules=[{action: skip, name: x}]'", "did you mean 'keep'?"),
        ("'rules=[{action: keep, pattern: x}]'", "did you mean 'name'?"),
        ("'rules=[{action: keep, role: attn}]'", "did you mean 'attention'?"),
        ("'rules=[{action: keep, role: lm_head}]'", "did you mean 'head'?"),
        ("'rules=[{action: cast, name: x, cast_to: bf16}]'", "did you mean 'bfloat16'?"),
        ("'rules=[{action: quantize, name: x, quant: {blocksize: 64}}]'", "did you mean 'group_size'?"),
        ("'rules=[{action: quantize, name: x, quant: {group_size: x}}]'", "rules[0].quant.group_size: expected a"),
        ("rules.name=x", "rules is a list; give all of it, such as"),
        ("rules=[{action: keep, role: head}]", "quote a value with spaces as a whole"),
        # words alone
        ("nf4", "give quant=nf4"),
        ("Q4_K_M", "give quant=gguf_q4_k_m"),
        ("llama70b", "give model=llama70b"),
        ("quant:nf4", "give quant=nf4"),
        ("quant", "as in quant="),
        ("gptq", "read here and not written"),
        ("./some/model", "give model.path=./some/model"),
        ("in.gguf out.gguf Q4_K_M", "out.gguf: expected key=value; give output.path=out"),
    ],
)  # fmt: skip
def test_a_near_miss_says_what_to_type(line: str, said: str) -> None:
    assert said in problems_of(line)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--quant nf4", "--quant nf4: unknown option; options are key=value: give quant=nf4"),
        ("--quant=NF4", "give quant=nf4"),
        ("--quant gptq", "not written"),
        ("-o out", "give output.path=out"),
        ("--model ./m", "give model.path=./m"),
        ("--force", "give output.overwrite=true"),
        ("--dry-run", "`weightmill plan` with the same settings"),
        ("--json", "give format=json"),
        ("--verbose", "progress is shown"),
        ("--config my.yaml", "experiment=NAME with --config-dir=DIR"),
        ("--nonsense-zzz", "unknown option; options are key=value, and --help, -m"),
        # mlx_lm.convert
        ("--hf-path org/name", "give model.path=org/name"),
        ("--mlx-path out", "give output.path=out"),
        ("--q-bits 4", "give quant.bits=4"),
        ("--q-group-size 32", "give quant.group_size=32"),
        ("-q", "give quant=NAME"),
        ("--upload-repo me/x", "output.path=hf://OWNER/NAME"),
        ("--dequantize", "quant=none quant.dtype=bfloat16"),
        # convert_hf_to_gguf.py and llama-quantize
        ("--outfile x.gguf", "give output.path=x"),
        ("--outtype q8_0", "give quant=gguf_q8_0"),
        ("--allow-requantize", "leave it out"),
        ("--pure", "give quant.pure=true"),
        ("--imatrix x.dat", "give quant.imatrix=x.dat"),
        ("--output-tensor-type q6_K", "give quant.output_type=q6_K"),
        ("--leave-output-tensor", "role: head, action: keep"),
        # AutoAWQ, AutoGPTQ, llm-compressor, transformers
        ("--w_bit 4", "give quant.bits=4"),
        ("--q_group_size 128", "give quant.group_size=128"),
        ("--scheme W4A16", "give quant=w4a16"),
        ("--ignore lm_head", "role: head, action: keep"),
        ("--load_in_4bit", "give quant=nf4"),
        ("--bnb_4bit_use_double_quant=true", "give quant.double_quant=true"),
        ("--model_name_or_path org/name", "give model.path=org/name"),
        ("--save_directory out", "give output.path=out"),
        ("--trust_remote_code", "never run"),
        ("--revision abc", "hf://OWNER/NAME@REVISION"),
        ("--seed 1", "nothing is random"),
    ],
)
def test_an_option_of_another_tool_says_what_to_type(line: str, said: str) -> None:
    assert said in problems_of(line)


def test_all_options_are_told_at_once_and_what_is_told_is_a_request(weightmill: Any) -> None:
    """What the messages say to type, typed, is a request."""
    ran = weightmill("plan", "--quant", "NF4", "--group-size", "128", "--threads", "2")
    assert ran.status == 2
    told = re.findall(r"give (\S+)", ran.err)
    assert told == ["quant=nf4", "quant.group_size=128", "cluster.threads=2"]
    assert weightmill("plan", *told).status == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("quantize", "it is `weightmill run` here"),
        ("convert", "it is `weightmill run` here"),
        ("Quantise", "it is `weightmill run` here"),
        ("dequantize", "run quant=none quant.dtype=bfloat16"),
        ("sweep", "run -m"),
        ("perplexity", "verify verify=logits"),
        ("info", "it is `weightmill inspect` here"),
        ("lnit", "it is `weightmill lint` here"),
        ("merge", "run transform=merge_lora"),
        ("quant=nf4", "the verb comes first, as in: weightmill run quant=nf4"),
        ("./model", "run model.path=./model"),
        ("zzzz", "no such verb: zzzz; known: run, plan"),
    ],
)
def test_a_verb_of_another_tool_says_what_it_is_here(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("clean", ["--dry-run"], "without delete=true nothing is deleted"),
        ("compare", ["swep=all"], "did you mean 'sweep'?"),
        ("inspect", ["tensors=ALL"], "did you mean 'all'?"),
        ("recommend", ["backend.memory=24"], "did you mean 'backend.memory_gb'?"),
        ("bench", ["kernel"], "did you mean 'kernels'?"),
        ("verify", ["out", "verify=ppl"], "did you mean 'logits'?"),
        ("lint", ["--path", "out"], "give output.path="),
        ("diff", ["a", "b", "tensors=everything"], "tensors: expected different or all"),
    ],
)
def test_every_verb_says_what_was_meant(verb: str, arguments: list[str], said: str, weightmill: Any) -> None:
    ran = weightmill(verb, *arguments)
    assert ran.status == 2
    assert said in ran.err
    assert not INNER.search(ran.err)


FILES = {
    "experiment/e1": ("# @package _global_\ndefaults: [override /quant: NF4]", "did you mean 'nf4'?"),
    "experiment/e2": ("# @package _global_\ndefaults: [override /qant: nf4]", "did you mean /quant?"),
    "experiment/e3": ("# @package _global_\ndefaults: [quant: nf4]", "write `override /quant: nf4`"),
    "experiment/e4": ("# @package _global_\nquant: nf4", "chooses by `defaults: [override /quant: nf4]`"),
    "experiment/e5": ("# @package _global_\nquant: [", "cannot be read"),
    "experiment/e6": ("- quant", "expected settings (key: value), found a list"),
    "experiment/e7": ("# @package _global_\nquant: {groupsize: 64}", "did you mean 'quant.group_size'?"),
    "experiment/e8": ("# @package _global_\nmodel_path: /x", "did you mean 'model.path'?"),
    "experiment/e9": ("# @package _global_\ndefaults: quant", "defaults: expected a list"),
    "quant/q1": ("kind: bnb\nname: mine", "quant.kind: expected a kind of none, bnb4"),
    "quant/q2": ("defaults: [NF4]\nname: mine", "did you mean 'nf4'?"),
    "quant/q3": ("name: mine", "quant.kind: it has no kind"),
    "quant/q4": ("", "it is empty; begin with a copy"),
    "quant/q5": ("defaults: [nf4, _self_]\nname: mine\ngroup_size: '64'", "quant.group_size: expected a whole number"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_ones_own_is_told_what_is_wrong_with_it(name: str, tmp_path: Path) -> None:
    text, said = FILES[name]
    path = tmp_path / f"{name}.yaml"
    path.parent.mkdir()
    path.write_text(text)
    assert said in problems_of(f"{path.parent.name}={path.stem} --config-dir={tmp_path}")


@pytest.mark.parametrize("name", [place for place, _ in fields_of(JobSpec) if place not in ("rules", "output.suffix")])
def test_a_value_of_a_wrong_type_is_refused_in_plain_words(name: str) -> None:
    """Every setting, given what it cannot be: whatever is said, it names the setting, and no inner word."""
    if name in choices_of("run"):
        said = problems_of(f"{name}=zzz")
    else:
        try:
            compose("run", JobSpec, take_apart("run", JobSpec, [f"++{name}={{a: [1]}}"]))
        except BadSpec as error:
            said = "\n".join(error.problems)
        else:
            pytest.skip("a setting of a choice that is not chosen takes nothing, and this one takes anything")
    # A setting that belongs to another choice is named by its group, with what has it.
    group, _, leaf = name.partition(".")
    assert name in said or (group in said and leaf.split(".")[0] in said)
    assert not INNER.search(said), said


@pytest.mark.quick
def test_every_word_of_the_tables_is_found() -> None:
    """Words are compared in small letters, with underscores: one that is written otherwise would never be met."""
    for table in (MEANT, KEYS_ELSEWHERE, ELSEWHERE, WITHOUT, OPTIONS, VERBS_ELSEWHERE):
        assert [word for word in table if plain(word) != word] == []
    assert not set(VERBS) & set(VERBS_ELSEWHERE)


def test_a_word_that_may_be_a_model_is_told_what_one_is(weightmill: Any) -> None:
    assert "no file or folder here has that name, and a model of the Hub is OWNER/NAME" in weightmill("run", "gpt2").err
