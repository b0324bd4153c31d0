"""What was meant by words of a command line that are none here: options, bare words, verbs, and keys of other tools."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence

from jobs.spec.keys import HELP_QUANT
from loaders.errors import setting
from loaders.near_misses import CASTS, ELSEWHERE, MEANT, WITHOUT, meant, near, plain, unknown_quant
from loaders.rules.llama_cpp import MIXES

Choices = Mapping[str, Sequence[str]]
Keys = Mapping[str, bool]  # the dotted names of settings, and whether each is true or false

# What other tools call the settings of a job; what a setting alone may be called stands in loaders/near_misses.py.
KEYS_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "torch_dtype": ("quant.dtype",), "precision": ("quant.dtype",), "dtype": ("quant.dtype",),
    "device": ("backend.kind",), "num_workers": ("cluster.threads",), "workers": ("cluster.threads",),
    "nthread": ("cluster.threads",), "n_threads": ("cluster.threads",), "threads": ("cluster.threads",),
    "num_threads": ("cluster.threads",), "t": ("cluster.threads",), "jobs": ("cluster.units_at_once",),
    "nproc": ("cluster.threads",), "cache": ("store.cache",), "cache_dir": ("store.cache",),
    "model_path": ("model.path",), "model_name": ("model.path",), "path": ("model.path",),
    "model_name_or_path": ("model.path",), "model_id": ("model.path",),
    "pretrained_model_name_or_path": ("model.path",), "repo": ("model.path",), "repo_id": ("model.path",),
    "hf_path": ("model.path",), "hf_repo": ("model.path",), "input": ("model.path",), "i": ("model.path",),
    "in": ("model.path",), "infile": ("model.path",), "input_dir": ("model.path",), "input_model": ("model.path",),
    "model_dir": ("model.path",), "src": ("model.path",), "source_path": ("model.path",),
    "checkpoint": ("model.path",), "ckpt": ("model.path",), "base": ("model.path",), "base_model": ("model.path",),
    "model": ("model.path",), "outfile": ("output.path",), "out": ("output.path",), "o": ("output.path",),
    "output_dir": ("output.path",), "outdir": ("output.path",), "out_dir": ("output.path",),
    "output_path": ("output.path",), "dst": ("output.path",), "save_dir": ("output.path",),
    "save_directory": ("output.path",), "save_path": ("output.path",), "mlx_path": ("output.path",),
    "dest": ("output.path",), "destination": ("output.path",), "output": ("output.path",),
    "upload_repo": ("output.path",), "hub_model_id": ("output.path",), "push_to_hub": ("output.path",),
    "force": ("output.overwrite",), "f": ("output.overwrite",), "y": ("output.overwrite",),
    "overwrite": ("output.overwrite",), "keep_split": ("output.split",), "split": ("output.split",),
    "private": ("output.private",), "adapter_path": ("transform.path",), "peft_path": ("transform.path",),
    "url": ("tracking.uri",), "mlflow": ("tracking.uri",), "tracking_uri": ("tracking.uri",),
    "experiment_name": ("tracking.experiment",),
}  # fmt: skip
# What is typed for a verb, and the command that does it.
VERBS_ELSEWHERE = {
    **dict.fromkeys(
        ("quantize", "quantise", "quant", "convert", "compress", "encode", "start", "job", "main", "q", "oneshot"),
        "run",
    ),
    **dict.fromkeys(("cast", "dequantize", "dequant", "unquantize"), "run quant=none quant.dtype=bfloat16"),
    **dict.fromkeys(("copy", "export", "save", "upload", "push"), "run quant=none output.path=OUT"),
    **dict.fromkeys(("merge", "merge_lora", "fuse"), "run transform=merge_lora transform.path=ADAPTER"),
    **dict.fromkeys(("sweep", "multirun", "grid"), "run -m"),
    **dict.fromkeys(("estimate", "dry_run", "dryrun", "preview", "explain"), "plan"),
    **dict.fromkeys(("check", "validate", "hash", "sha256"), "verify"),
    **dict.fromkeys(("eval", "evaluate", "perplexity", "ppl", "judge", "test", "kld"), "verify verify=logits"),
    **dict.fromkeys(("info", "show", "dump", "stat", "describe", "cat", "view"), "inspect"),
    **dict.fromkeys(("ps", "watch", "progress", "top", "resume", "state"), "status"),
    **dict.fromkeys(("ls", "jobs", "outputs"), "list"),
    **dict.fromkeys(("log", "mlflow", "sync"), "track"),
    **dict.fromkeys(("cmp",), "diff"),
    **dict.fromkeys(("results", "table", "pareto", "report", "plot", "ui"), "compare"),
    **dict.fromkeys(("suggest", "fit", "fits", "choose", "pick", "advise"), "recommend"),
    **dict.fromkeys(("cleanup", "rm", "delete", "remove", "gc", "prune", "purge"), "clean"),
    **dict.fromkeys(("benchmark", "speed", "time", "profile"), "bench"),
}
# Options whose meaning here is more than a key and a value.
OPTIONS = {
    "dry_run": "`weightmill plan` with the same settings says what would be done",
    "version": "`weightmill --version` prints it",
    "load_in_4bit": "give quant=nf4",
    "load_in_8bit": "give quant=int8",
    "dequantize": "give quant=none quant.dtype=bfloat16",
    "d": "give quant=none quant.dtype=bfloat16",
    "push_to_hub": "give output.path=hf://OWNER/NAME",
    "upload_repo": "give output.path=hf://OWNER/NAME",
    "json": "give format=json",
    "j": "give format=json",
    "sweep": "-m sweeps over lists, as in: -m quant=nf4,fp4",
    "pareto": "-m sweeps over lists, as in: -m quant=nf4,fp4",
    "eval": "give verify=logits",
    "evaluate": "give verify=logits",
    "perplexity": "give verify=logits",
    "lora": "give transform=merge_lora transform.path=ADAPTER",
    "adapter": "give transform=merge_lora transform.path=ADAPTER",
    "no_tracking": "give tracking=none",
    "offline": "set HF_HUB_OFFLINE=1 in the environment",
    **dict.fromkeys(
        ("config", "c", "config_file", "config_name", "recipe", "yaml", "args"),
        "settings in a file are a choice: experiment=NAME with --config-dir=DIR, where DIR/experiment/NAME.yaml is",
    ),
    "pure": "give quant.pure=true",
}
# The setting that takes what was given to a group by mistake: a path, an address.
PATH_OF = {
    "model": "model.path", "output": "output.path", "transform": "transform.path", "tracking": "tracking.uri",
    "cluster": "cluster.address", "source": "model.path", "store": "store.endpoint", "verify": "verify.text",
}  # fmt: skip
# Kinds of weight files that may be given for a layout, and the layout that has them.
CONTAINER_OF = {"safetensors": ("safetensors", "hf"), "safetensor": ("safetensors", "hf"),
                **dict.fromkeys(("pytorch", "bin", "pt", "pth", "pkl", "torch"), ("pytorch", "hf"))}  # fmt: skip
WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def verb_meant(word: str, known: Sequence[str]) -> str:
    """Say which verb was meant by an unknown one."""
    if "=" in word:
        return f"{word}: the verb comes first, as in: weightmill run {word}"
    bare = plain(word)
    found = VERBS_ELSEWHERE.get(bare) or meant(bare, known)
    if found is None and is_path(word):
        found = f"run model.path={word}"
    hint = f"; it is `weightmill {found}` here" if found else ""
    return f"no such verb: {word}{hint}; known: {', '.join(known)}, help, completion"


def key_meant(word: str, keys: Collection[str]) -> str | None:
    """Return the dotted name of the setting, or the group, that was meant by a word; None if none is near."""
    wanted = plain(word)
    if wanted in keys:
        return wanted
    for each in (*KEYS_ELSEWHERE.get(wanted, ()), *MEANT.get(wanted, ()), wanted):
        if each in keys:
            return each
        if found := _with_leaf(each, keys):
            return found
    group, dot, leaf = wanted.rpartition(".")
    if dot:
        within = [key for key in keys if key.startswith(f"{meant(group, [k for k in keys if '.' not in k]) or group}.")]
        leaves = {key.rpartition(".")[2]: key for key in within}
        if (near_leaf := meant(leaf, leaves)) is not None:
            return leaves[near_leaf]
    # Short words are near to many.
    if len(wanted) < 3:
        return None
    return meant(wanted, keys) or _with_leaf(meant(wanted, {key.rpartition(".")[2] for key in keys}) or "", keys)


def _with_leaf(leaf: str, keys: Collection[str]) -> str | None:
    found = [key for key in keys if leaf and key.endswith(f".{leaf}")]
    return next((key for key in found if key.startswith("quant.")), found[0] if found else None)


def key_hint(word: str, keys: Collection[str]) -> str:
    """Return "; did you mean 'this'?" for a key; empty if none is near."""
    found = key_meant(word, keys)
    return f"; did you mean {found!r}?" if found is not None and found != word else ""


def setting_meant(word: str, value: str | None, keys: Keys, choices: Choices) -> str | None:
    """Return the setting that was meant by an option of another tool: "quant=nf4" for --quant NF4."""
    key = key_meant(word, keys)
    if key is None:
        return None
    if value is None:
        return f"{key}=true" if keys.get(key) else f"{key}={'NAME' if key in choices else 'VALUE'}"
    if key in choices:
        option = meant(value, choices[key])
        if option is not None:
            return f"{key}={option}"
        takes_path = key in PATH_OF and (is_path(value) or key in ("model", "output"))
        return f"{PATH_OF[key]}={value}" if takes_path else f"{key}=NAME"
    return _given(key, value)


def _given(key: str, value: str) -> str:
    """Return a key and its value; an output is the folder in which the named file will be."""
    if key == "output.path" and value.lower().endswith(WEIGHTS):
        value = value[: value.rindex(".")]
    return f"{key}={value}"


def option_problem(option: str, value: str | None, keys: Keys, choices: Choices, *, sweeps: bool) -> str:
    """Say what to give instead of an option; `value` is the word after it, if it may belong to it."""
    name, equals, own = option.lstrip("-").partition("=")
    value = own if equals else value
    shown = option if equals or value is None else f"{option} {value}"
    bare = plain(name)
    if bare == "dry_run" and "delete" in keys:
        return f"{shown}: unknown option; without delete=true nothing is deleted"
    if bare not in keys and (said := OPTIONS.get(bare) or WITHOUT.get(bare)) is not None:
        return f"{shown}: unknown option; {said}"
    if plain(value or "") in ELSEWHERE and key_meant(name, keys) == "quant":
        return f"{shown}: unknown option, and {unknown_quant(value, choices.get('quant', ()), ' ')}".rstrip()
    found = setting_meant(name, value, keys, choices)
    hint = f": give {found}" if found else f", and --help{', -m' if sweeps else ''}; `weightmill help` lists them"
    return f"{shown}: unknown option; options are key=value{hint}"


def bare_problem(word: str, keys: Keys, choices: Choices, paths: list[str]) -> str:
    """Say what to give instead of a word without a key. `paths` are the paths among those before, which grows."""
    said = f"{word}: expected key=value"
    if word.startswith(("[", "{", "'", '"')) or word.endswith((",", ":", "]", "}", "'", '"')):
        return f"{said}; quote a value with spaces as a whole: 'rules=[{{action: keep, role: head}}]'"
    if ":" in word and "://" not in word and word.partition(":")[0] in keys:
        key, _, value = word.partition(":")
        return f"{said}; give {key}={value.strip() or 'VALUE'}"
    if plain(word) in choices:
        return f"{said}, as in {plain(word)}={choices[plain(word)][0]}"
    path = next((key for key in ("model.path", "output.path") if key in keys and key not in paths), None)
    if path is not None and (os.path.lexists(word) or word.lower().endswith(WEIGHTS)):
        paths.append(path)
        return f"{said}; give {_given(path, word)}"
    for group, options in choices.items():
        if (option := meant(word, options)) is not None and (option == plain(word) or len(plain(word)) > 2):
            return f"{said}; give {group}={option}"
    if "quant" in choices and (plain(word) in ELSEWHERE or plain(word).upper() in MIXES):
        return f"{said}; as a quant: {choice_problem('quant', word, choices['quant'])}"
    if path is not None and is_path(word):
        paths.append(path)
        return f"{said}; give {_given(path, word)}"
    found = key_meant(word, keys)
    if found is None and path is not None:
        said = f"{said}; no file or folder here has that name, and a model of the Hub is OWNER/NAME"
    return f"{said}; is it {f'{found}=...'!r}?" if found else f"{said}; `weightmill help` lists the settings"


def choice_problem(group: str, chosen: str, options: Sequence[str]) -> str:
    """Say that there is no such choice, and what was meant."""
    if not chosen:
        return f"{group}: expected a choice after {group}=; known: {', '.join(options)}"
    if group in PATH_OF and is_path(chosen):
        return f"{group}: {chosen!r} is none of its choices, {', '.join(options)}; give {PATH_OF[group]}={chosen}"
    if group == "quant" and (dtype := CASTS.get(plain(chosen))) is not None:
        as_gguf = "; for llama.cpp, quant=gguf_bf16 or quant=gguf_f16"
        return f"quant: unknown choice {chosen!r}: it is a cast: quant=none quant.dtype={dtype}{as_gguf}"
    if group == "quant":
        mix = plain(chosen).removeprefix("gguf_").upper()
        if mix in MIXES and f"gguf_{mix.lower()}" not in options:
            return f"quant: unknown choice {chosen!r}; give quant=gguf_q4_k_m quant.file_type={mix}"
        said = unknown_quant(chosen, options, f"; {setting(HELP_QUANT)}").replace("unknown ", "", 1)
        return f"quant: unknown choice {said}"
    hint = near(chosen, options)
    if group == "output" and plain(chosen) in CONTAINER_OF:
        container, layout = CONTAINER_OF[plain(chosen)]
        hint = f"; give output.container={container}, or output={layout}"
    if not hint and group in ("model", "output") and re.fullmatch(r"[\w.\-]+", chosen):
        hint = f"; a folder is given by {PATH_OF[group]}={chosen}"
    return f"{group}: unknown choice {chosen!r}{hint}; known: {', '.join(options)}"


def is_path(word: str) -> bool:
    """Whether a word is a path, a URL, or OWNER/NAME."""
    return "/" in word or word in (".", "..") or word.startswith("~") or word.lower().endswith(WEIGHTS)
