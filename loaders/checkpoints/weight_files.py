"""Which files of a folder are the model: those that its engine would load, and a sentence about those passed over.

transformers looks for one file with the usual name, then for an index, in safetensors before PyTorch's files; vLLM
takes the index first. Where both are there and may be of different trainings, nothing is chosen: the folder is refused
by name. What is no model (adapters, optimizer states, pieces of FSDP and DeepSpeed) is known by its name: see NO_MODEL.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from loaders.checkpoints.aux_files import INDEX_SUFFIX, WEIGHT_SUFFIXES
from loaders.containers import CONTAINERS, packed
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import JSON_CONFIG
from loaders.storage.base import Entry, PinnedFiles
from loaders.storage.json_files import read_json
from loaders.storage.times import may_be_newer

ENDINGS = "|".join(re.escape(suffix) for container in CONTAINERS.values() for suffix in container.suffixes)
SHARD = re.compile(rf"^(?P<stem>.*)-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})(?:{ENDINGS})$")
USUAL = ("model", "pytorch_model", "diffusion_pytorch_model")  # the stems of what transformers and diffusers write
# A variant of the usual files (fp16, bf16, ema, ...), as transformers and diffusers name them, now and before.
VARIANT = re.compile(
    rf"^(?P<stem>{'|'.join(USUAL)})\.(?P<variant>[A-Za-z_]\w*)(?:-\d{{5}}-of-\d{{5}})?(?:{ENDINGS})$"
    rf"|^(?:{'|'.join(USUAL)})-\d{{5}}-of-\d{{5}}\.(?P<before>[A-Za-z_]\w*)(?:{ENDINGS})$"
)
# Weights under their publisher's own names, as Meta and Mistral put them beside those for transformers.
CONSOLIDATED = re.compile(r"^consolidated[-.]")
SLICE = re.compile(r"^consolidated\.\d\d\.pth$")  # Meta's form: each file has a slice of every matrix
ADAPTER_CONFIG = "adapter_config.json"
MERGE = "peft's merge_and_unload"  # what a program may call by a setting of its own
LONGEST_NAME = 255  # characters: no filesystem in use has longer names of files
SHOWN = 4  # files that a sentence names before it counts the rest


@dataclass(frozen=True, slots=True)
class NoModel:
    """A kind of file with the suffix of weights that is no model by itself.

    `what` completes "passed over: FILE (...)", and `instead` says what to do with a folder that has nothing else.
    """

    pattern: re.Pattern[str]
    what: str
    instead: str


ADAPTER = NoModel(
    re.compile(
        r"^(?:(?:\d+_)?adapters?|adapter_model|pytorch_lora_weights|non_lora_trainables)(?:[-._].*)?\.(?:safetensors|bin|pt|npz)$"
    ),
    "an adapter, which is not merged",
    "give the folder of that adapter to hear how to merge it",
)
STATE = NoModel(
    re.compile(
        r"^(?:train(?:ing)?_(?:args|states?)|trainer_state|optim|optimizer|(?:lr_)?scheduler|rng_state|random_states"
        r"|(?:grad_)?scaler|sampler|dataloader|dl_state_dict|custom_checkpoint)"
        r"(?:\d[\w.-]*|[-._][\w.-]*)?\.(?:bin|pt|pth|pkl|ckpt|safetensors|npz)$"
    ),
    "the state of a training",
    "give the folder that holds the model itself",
)
NO_MODEL = (
    ADAPTER,
    STATE,
    NoModel(
        re.compile(r"(?:^|[-._])(?:mmproj|imatrix)(?:[-._].*)?\.gguf$"),
        "what llama.cpp takes beside a model",
        "give the folder that holds the model itself",
    ),
    NoModel(
        re.compile(r"_(?:model|optim)_states\.pt$"),
        "a piece of a DeepSpeed training",
        "put the pieces together first: python zero_to_fp32.py, which lies beside them",
    ),
    NoModel(
        re.compile(r"\.distcp$"),
        "a piece of an FSDP or another distributed training",
        "put the pieces together first: accelerate merge-weights DIR OUT, or python -m"
        " torch.distributed.checkpoint.format_utils dcp_to_torch DIR OUT.pt",
    ),
    NoModel(
        re.compile(
            r"^(?:model_optim_rng|distrib_optim)\.pt$"
            r"|^(?!.*lora)(?:.*[-_.])?rank[-_]?\d+(?:[-_]part[-_]\d+)?\.(?:pt|pth|bin|safetensors)$"
        ),
        "what one rank of a parallel run held",
        "merge the ranks' files with the tool that saved them (accelerate merge-weights for FSDP, Megatron's and verl's"
        " own converters)",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chosen:
    """The weight files that are read, their container, the index's map of tensors to files, and notes for the user."""

    container: str
    files: tuple[str, ...]
    index: Mapping[str, str] | None
    notes: tuple[str, ...]


def choose(source: PinnedFiles, everything: Sequence[Entry], container: str, key: str) -> Chosen:
    """Choose the weight files of a folder whose files are `everything`, those of sub-folders included.

    `container` is a name in CONTAINERS, or "auto" for the first that is found; `key` is what messages call the folder.

    Raises:
        BadSpec: the folder holds no weights of the container, or nothing that is a model by itself.
        BadCheckpoint: files are missing, or it cannot be told which of them are the model.
    """
    names = sorted(name for name in source.entries if not name.startswith("."))
    usable = [name for name in names if no_model(name) is None]
    if _is_adapter_alone(names, usable):
        raise BadSpec(adapter_alone(source, key))
    for candidate in CONTAINERS if container == "auto" else (container,):
        if candidate == "packed":
            others = [n for n in usable if n.endswith(WEIGHT_SUFFIXES) and n != packed.WEIGHTS]
            if packed.is_packed(names, alone=not others) or (container == "packed" and packed.WEIGHTS in names):
                return Chosen(candidate, (), None, _notes({}, everything, [packed.WEIGHTS], candidate))
            continue
        suffixes = CONTAINERS[candidate].suffixes
        mine = [name for name in usable if name.endswith(suffixes)]
        mine, variants = _without_variants(source, mine, key)
        indexes = [name for name in usable if name.endswith(tuple(s + INDEX_SUFFIX for s in suffixes))]
        if mine or indexes:
            files, index, why = _of_container(source, candidate, mine, indexes, key)
            return Chosen(candidate, tuple(files), index, _notes(variants | why, everything, files, candidate))
    raise BadSpec(_nothing(source, everything, container, key))


def no_model(name: str) -> NoModel | None:
    """Return the kind of a file that is no model by itself, by its name; None for any other file."""
    base = name.rpartition("/")[2].removesuffix(INDEX_SUFFIX)
    return next((kind for kind in NO_MODEL if kind.pattern.search(base)), None)


# --- the files of one container


Why = dict[str, str]  # by file that is passed over: the reason


def _without_variants(source: PinnedFiles, mine: list[str], key: str) -> tuple[list[str], Why]:
    """Return a container's files without variants of the usual ones, and why each variant is passed over.

    A folder that has one variant and nothing else is that variant.

    Raises:
        BadSpec: there are several variants and no usual files.
    """
    found = {name: match["variant"] or match["before"] for name in mine if (match := VARIANT.match(name))}
    others = [name for name in mine if name not in found]
    if any(_is_named_usually(name) for name in others):
        return others, {name: f"the variant {variant} of the model beside it" for name, variant in found.items()}
    if len(set(found.values())) > 1:
        raise BadSpec(
            f"{key}: {source.address} holds the variants {', '.join(sorted(set(found.values())))} and not the usual"
            " files; give the address of the one that is wanted"
        )
    return mine, {}


def _of_container(
    source: PinnedFiles, container: str, mine: list[str], indexes: list[str], key: str
) -> tuple[list[str], dict[str, str] | None, Why]:
    """Return the files, the index's map, and for each of the container's other files why it is passed over."""
    kind, why = CONTAINERS[container], Why()
    if kind.index in indexes:
        files, weight_map = _of_index(source, kind.index, kind.single)
        why = {name: "the index does not name it" for name in mine if name not in files}
        if kind.single in why:
            why[kind.single] = f"older than {kind.index}, yet transformers would load it: remove it"
        return files, weight_map, why
    others = [name for name in (*mine, *indexes) if not CONSOLIDATED.match(name)]
    if others:
        why = {n: "its publisher's own names; the others are transformers'" for n in mine if n not in others}
        mine, indexes = [n for n in mine if n in others], [n for n in indexes if n in others]
    if kind.single in mine and container != "gguf":
        return [kind.single], None, why | {n: f"{kind.single} is the model" for n in mine if n != kind.single}
    if len(indexes) > 1:
        raise BadCheckpoint(
            f"{source.address}: several indexes, expected one: {some(indexes)}; remove those that are stale"
        )
    if indexes:
        files, weight_map = _of_index(source, indexes[0], None)
        return files, weight_map, why | {n: "the index does not name it" for n in mine if n not in files}
    files = _without_index(source, mine)
    slices = [name for name in files if SLICE.match(name)]
    if len(slices) > 1:
        raise BadCheckpoint(
            f"{source.address}: {some(slices)} hold slices of every matrix; put them together first: transformers'"
            " convert_llama_weights_to_hf.py"
        )
    if container == "gguf" and len(files) > 1 and not SHARD.match(files[0]):
        raise BadSpec(
            f"{key}: {len(files)} GGUF files in {source.address}, each a model of its own: {', '.join(files)}; give"
            f" the one that is wanted: {source.address / files[0]}"
        )
    return files, None, why | {n: "not one of this set of shards" for n in mine if n not in files}


def _of_index(source: PinnedFiles, name: str, single: str | None) -> tuple[list[str], dict[str, str]]:
    """Read an index. `single` is the whole model that transformers would load instead, if that file is there."""
    weight_map = read_json(source, name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadCheckpoint(f"{name}: expected a weight_map of tensor names to file names")
    files = sorted(set(weight_map.values()))
    if not files:
        raise BadCheckpoint(f"{name}: its weight_map is empty; fetch the index again, or remove it")
    for file in files:
        _check_inside(name, file)
    beside = single if single is not None and single in source.entries and single not in files else None
    missing = [file for file in files if source.find(file) is None]
    if missing:
        advice = "" if beside is None else f"; {beside} is there: if it is the model, the index is stale: remove {name}"
        raise BadCheckpoint(f"{name}: {len(missing)} of its {len(files)} files are missing: {some(missing)}{advice}")
    if beside is not None and may_be_newer(source.store, source.entry(beside), source.entry(name)):
        raise BadCheckpoint(
            f"{beside} lies beside {name}, whose {len(files)} files are there too ({some(files)}), and is newer:"
            f" transformers loads {beside}, vLLM the others; remove {name} and its files, or {beside}"
        )
    return files, weight_map


def _check_inside(index: str, file: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or not path.parts:
        raise BadCheckpoint(
            f"{index}: it names {file[:200]!r}, which leaves the checkpoint's folder; do not trust this index"
        )
    if not file.isprintable() or any(len(part) > LONGEST_NAME for part in path.parts):
        raise BadCheckpoint(f"{index}: it names {file[:200]!r}, which is no name of a file; do not trust this index")


def _without_index(source: PinnedFiles, names: list[str]) -> list[str]:
    """Choose the weight files where no index names them: a complete set of shards, or all of them."""
    shards: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = SHARD.match(name)
        if match:
            shards.setdefault((match["stem"], int(match["count"])), []).append(name)
    if not shards:
        return names
    # A folder may hold stray shards of another set, such as those of an interrupted download.
    whole = [(stem, count) for (stem, count), found in shards.items() if len(found) == count]
    usual = [(stem, count) for stem, count in whole if stem in USUAL] or whole
    if len(usual) > 1:
        sets = " and ".join(f"{stem} in {count} shards" for stem, count in usual[:SHOWN])
        raise BadCheckpoint(
            f"{source.address}: {len(usual)} whole sets of shards and no index: {sets}; give the address of one file of"
            " the set that is wanted"
        )
    if usual:
        return shards[usual[0]]
    (stem, count), found = max(shards.items(), key=lambda item: len(item[1]))
    numbers = {int(SHARD.match(name)["number"]) for name in found}  # type: ignore[index]
    missing = sorted(set(range(1, count + 1)) - numbers)
    raise BadCheckpoint(
        f"{source.address}: {stem} has {len(found)} of {count} shards; missing: {missing[:8]}; fetch them"
    )


# --- what is said


def _notes(why: Why, everything: Sequence[Entry], files: Sequence[str], container: str) -> tuple[str, ...]:
    """Say which files are read and why the others are not; nothing where there are no others."""
    reasons: dict[str, list[str]] = {}
    for entry in everything:
        name, kind = entry.name, no_model(entry.name)
        if name in files or not name.endswith(WEIGHT_SUFFIXES) or name.rpartition("/")[2].startswith("."):
            continue
        if container == "packed" and (name.startswith(packed.WEIGHTS) or "/" in name):
            continue
        if "/" in name and kind is None:
            reasons.setdefault("in sub-folders", []).append(name)
        else:
            reason = kind.what if kind is not None else why.get(name, f"{container} comes first")
            reasons.setdefault(reason, []).append(name)
    if not reasons:
        return ()
    passed = "; ".join(f"{some(names)} ({reason})" for reason, names in reasons.items())
    return (f"weights are read from {some(files)}; other weight files are not read and not carried over: {passed}",)


def some(names: Sequence[str]) -> str:
    """Return the first few of many names as text."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_adapter_alone(names: Sequence[str], usable: Sequence[str]) -> bool:
    """Whether a folder is an adapter: it has one, and none of the files under which models are published.

    Trained parts of another form (a value head, new embeddings) may lie beside an adapter's own file.
    """
    if not any(ADAPTER.pattern.search(name) for name in names):
        return False
    weights = [name for name in usable if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
    return not weights or (ADAPTER_CONFIG in names and not any(_is_named_usually(name) for name in weights))


def _is_named_usually(name: str) -> bool:
    return name.endswith(INDEX_SUFFIX) or SHARD.match(name) is not None or name.partition(".")[0] in USUAL


def adapter_alone(source: PinnedFiles, key: str) -> str:
    """Return the message about a folder that is an adapter and nothing else."""
    base = None
    if source.find(ADAPTER_CONFIG) is not None:
        base = read_json(source, ADAPTER_CONFIG, JSON_CONFIG).get("base_model_name_or_path")
    of, where = "", "the model that it was trained on"
    if isinstance(base, str) and base:
        of, where = f" of {base[:200]!r}", f"{base[:200]!r}"
    # What a program calls the merge may have a place for the adapter's path.
    merge = setting(MERGE).replace("{adapter}", shlex.quote(str(source.address)))
    return (
        f"{key}: {source.address} holds an adapter{of}, not a model; to merge it into its base: {merge}, where BASE is"
        f" the folder with {where}"
    )


def _nothing(source: PinnedFiles, everything: Sequence[Entry], container: str, key: str) -> str:
    """Say what a folder without weights of the container holds instead, and what to do."""
    names = [entry.name for entry in everything]
    pieces = [(name, kind) for name in names if (kind := no_model(name)) is not None]
    # An optimizer's state lies beside the pieces of a training, and what to do with those is the better advice.
    pieces.sort(key=lambda piece: -NO_MODEL.index(piece[1]))
    wanted = " or ".join(CONTAINERS) if container == "auto" else container
    said = f"{key}: expected {wanted} weights in {source.address}, found"
    inner = sorted({n.rpartition("/")[0] for n in names if "/" in n and n.endswith(ALL_SUFFIXES) and not no_model(n)})
    if pieces and (not inner or NO_MODEL.index(pieces[0][1]) > NO_MODEL.index(STATE)):
        name, kind = pieces[0]
        return f"{said} {name}, {kind.what}; {kind.instead}"
    if inner:
        return f"{said} weights in its sub-folders only: {some(inner)}; give the one that is wanted"
    others = [name for name in names if "/" not in name and name.endswith(WEIGHT_SUFFIXES)]
    top = sum("/" not in name for name in names)
    return f"{said} {f'{len(others)} other weight files ({some(others)})' if others else f'{top} files'}"


ALL_SUFFIXES = tuple(suffix for container in CONTAINERS.values() for suffix in container.suffixes)
