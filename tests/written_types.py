"""The model types that are written for mlx-lm and llama.cpp, as docs/tested.md lists them, by what holds them."""

from __future__ import annotations

from loaders.architectures.family_files import known_types
from tests.gguf_goldens import GOLDENS
from tests.tiny_configs import TINY


def table() -> str:
    """Return the table in docs/tested.md: types held on a tiny model against the engine's own tool, and relatives."""
    from tests import mlx_reference

    tiny = {**TINY, **mlx_reference.MORE}
    kinds = {
        "mlx": [kind for kind in tiny if kind not in mlx_reference.APART],
        "gguf": [path.stem for path in GOLDENS.glob("*.json") if path.stem in TINY],
    }
    rows = ["| output | model types, each held on a tiny model | by their likeness |", "|---|---|---|"]
    for engine, name in (("mlx", "MLX"), ("gguf", "GGUF")):
        written = known_types(engine)
        held = {kind if kind in mlx_reference.OWN_TYPES else tiny[kind].model_type for kind in kinds[engine]}
        one, other = ([each for each in written if (each in held) == is_held] for is_held in (True, False))
        rows.append(f"| {name}, {len(written)} | {_listed(one)} | {_listed(other)} |")
    return "\n".join(rows)


def _listed(types: list[str]) -> str:
    return " ".join(f"`{each}`" for each in types)
