"""The tensors that the weight files of a checkpoint hold together: each name once, under the name that engines know.

Engines read every tensor of every file, and where two files hold one name the later file wins. So copies with the same
bytes are read once, and copies that differ are read only if an index decides for the file that engines read last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loaders.errors import BadCheckpoint
from loaders.limits import check_tensors
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.words import counted

COMPARE_BYTES = 4 << 20  # bytes of two copies compared at a time, so that large tensors take little memory
# What torch.compile, FSDP, activation checkpointing and Lightning put into the names of the modules that they wrap.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# What DataParallel and DDP put before all names. Models have modules of this name, so it goes only where all begin so.
PARALLEL = "module."
FLAT = ("_flat_param", "flat_param")  # FSDP's parameters, in which the weights of many layers lie one after another
LORA = re.compile(r"\.(?:lora_(?:embedding_)?[ABab]|lora_magnitude_vector|lora_down|lora_up)(?:\.|$)")
OF_ADAPTER = re.compile(r"^base_model\.model\.|\.modules_to_save\.|\.alpha$")


def single(
    source: PinnedFiles, weights: Iterable[WeightSpec], index: Mapping[str, str] | None
) -> tuple[tuple[WeightSpec, ...], list[str]]:
    """Return each tensor once, and notes about copies and about tensors that the index does not name.

    Raises:
        BadCheckpoint: copies differ and nothing decides between them, the index puts a tensor where it is not, or there
            are too many.
    """
    found: dict[str, WeightSpec] = {}
    copies: dict[str, list[WeightSpec]] = {}
    for spec in weights:
        if spec.name in found:
            copies.setdefault(spec.name, [found[spec.name]]).append(spec)
        else:
            found[spec.name] = spec
    check_tensors(len(found), str(source.address))
    equal, decided = [], []
    for name, specs in copies.items():
        wanted = None if index is None else index.get(name)
        chosen = next((spec for spec in specs if spec.file == wanted), specs[0])
        if all(_same(source, chosen, spec) for spec in specs if spec is not chosen):
            equal.append(name)
        elif chosen.file == wanted and chosen is specs[-1]:
            decided.append(name)
        else:
            raise BadCheckpoint(_undecided(name, specs, wanted))
        found[name] = chosen
    if index is not None:
        _check_places(found, index)
    notes = [f"{_count(equal)} in several files with the same bytes, {_where(copies, equal[0])}"] if equal else []
    if decided:
        notes.append(
            f"{_count(decided)} in several files with other bytes, {_where(copies, decided[0])}: read from"
            f" {found[decided[0]].file}, as the index says; the others are stale"
        )
    extra = sorted(set(found) - set(index)) if index is not None else []
    if extra:
        notes.append(
            f"{_count(extra)} in the files but not in the index, {extra[0]!r} in {found[extra[0]].file} first: read"
            " all the same, as engines read them"
        )
    return tuple(found.values()), notes


def _check_places(found: Mapping[str, WeightSpec], index: Mapping[str, str]) -> None:
    wrong = [name for name, file in index.items() if name not in found or found[name].file != file]
    if wrong:
        name = wrong[0]
        where = f"it is in {found[name].file}" if name in found else "no file has it"
        raise BadCheckpoint(
            f"the index puts {counted(len(wrong), 'tensor where it is', 'tensors where they are')} not,"
            f" {name[:200]!r} in {index[name]}: {where};"
            " fetch the index and its shards again"
        )


def _same(source: PinnedFiles, one: WeightSpec, other: WeightSpec) -> bool:
    """Whether two copies are the same; their bytes are read only if nothing else tells."""
    if (one.dtype, one.shape, one.stride, one.size) != (other.dtype, other.shape, other.stride, other.size):
        return False

    def piece(spec: WeightSpec, at: int) -> memoryview:
        return source.read(spec.file, spec.offset + at, spec.offset + min(at + COMPARE_BYTES, spec.size))

    return all(piece(one, at) == piece(other, at) for at in range(0, one.size, COMPARE_BYTES))


def _undecided(name: str, specs: Sequence[WeightSpec], wanted: str | None) -> str:
    files = " and in ".join(dict.fromkeys(spec.file for spec in specs))
    says = "" if wanted is None else f"; the index says {wanted}, while engines would read {specs[-1].file}"
    return f"{name!r} is in {files}, with other bytes{says}; one of them is stale: remove it"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def _where(copies: Mapping[str, Sequence[WeightSpec]], name: str) -> str:
    return f"{name!r} in {' and '.join(spec.file for spec in copies[name])}"


# --- names


def unwrapped(weights: tuple[WeightSpec, ...]) -> tuple[tuple[WeightSpec, ...], list[str]]:
    """Take from the names what training put into them, and say so.

    Raises:
        BadCheckpoint: two tensors would have the same name then, or hold the flat parameters of FSDP.
    """
    # A checkpoint can have half a million names, nearly always plain ones: one search in all of them tells.
    every = "\n" + "\n".join(spec.name for spec in weights)
    if not any(part in every for part in (*WRAPPERS, f"\n{PARALLEL}", *FLAT)):
        return weights, []
    new = {spec.name: _without_wrappers(spec.name) for spec in weights}
    gone = Counter(part for spec in weights for part in spec.name.split(".") if part in WRAPPERS)
    while new and all(name.startswith(PARALLEL) and name != PARALLEL for name in new.values()):
        new = {old: _without_wrappers(name.removeprefix(PARALLEL)) for old, name in new.items()}
        gone[PARALLEL.rstrip(".")] += len(new)
    flat = next((old for old, name in new.items() if name.endswith(FLAT)), None)
    if flat is not None:
        raise BadCheckpoint(
            f"{flat!r}: a flat parameter of FSDP, in which layers are not told apart; save the model with"
            " StateDictType.FULL_STATE_DICT"
        )
    left = [name for name in new.values() if name.startswith(PARALLEL)]
    notes = list[str]()
    if left:
        notes.append(
            f"{len(left)} of {len(new)} names begin with {PARALLEL}, {left[0]!r} first: it is left, since DDP puts it"
            " before all names or none; check that the engine knows them"
        )
    changed = [old for old, name in new.items() if old != name]
    if not changed:
        return weights, notes
    first: dict[str, str] = {}
    for old, name in new.items():
        if name in first:
            raise BadCheckpoint(
                f"{first[name]!r} and {old!r} would both be {name!r} without {', '.join(gone)}: two models in one"
                " checkpoint, or a stale copy; save the one that is wanted"
            )
        first[name] = old
    renamed = tuple(
        replace(
            spec,
            name=new[spec.name],
            alias=None if spec.alias is None else new[spec.alias],
            own_name=None if new[spec.name] == spec.name else spec.name,
        )
        for spec in weights
    )
    said = ", ".join(f"{part}." for part in gone)
    return renamed, [
        *notes,
        f"{said} is taken from the names of {len(changed)} of {len(new)} tensors ({changed[0]!r} first): training put"
        " it there, and no engine knows such names",
    ]


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    left = [part for part in parts if part not in WRAPPERS]
    return ".".join(left) if left and len(left) < len(parts) else name


def is_adapter(weights: Sequence[WeightSpec]) -> bool:
    """Whether tensors are an adapter's and nothing else, by their names."""
    parts = set(_of_lora(weights))
    others = [spec.name for spec in weights if spec.name not in parts] if parts else []
    is_whole = any(".base_layer." in name for name in others)
    return bool(parts) and not is_whole and all(OF_ADAPTER.search(name) for name in others)


def adapter_notes(weights: Sequence[WeightSpec]) -> list[str]:
    """Say that a model's tensors have those of an adapter among them."""
    names = _of_lora(weights)
    if not names:
        return []
    return [
        f"{counted(len(names), 'tensor of an adapter is', 'tensors of an adapter are')} among the model's and not"
        f" merged, {names[0]!r} first: only code that"
        " expects them loads them"
    ]


def _of_lora(weights: Sequence[WeightSpec]) -> list[str]:
    return [spec.name for spec in weights if "lora_" in spec.name and LORA.search(spec.name)]
