"""The one way by which transformers, mlx-lm and hqq load what is in a folder. Nothing that comes with it is run.

transformers asks on standard input whether it may run a checkpoint's own Python, wherever a call leaves that open, as
calls inside of libraries do. A config may also name attention or experts by OWNER/NAME, which are fetched from the Hub
and run. Here nobody is asked, and both are refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, BadSpec

OURS: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
# By "configuration_files", a config.json has transformers read another, such as config.5.0.0.json.
CONFIGS = ("config*.json", "generation_config.json")
LONGEST = 16 << 20  # bytes of a file of CONFIGS: more is refused where checkpoints are opened
# Settings of a config that may name code of the Hub; transformers writes some of them with a word before or after.
KERNELS = ("attn_implementation", "experts_implementation")
_lock = threading.RLock()


def model_from(auto: Any, folder: Path | str, **options: Any) -> Any:
    """Load a model by one of transformers' Auto classes, from a folder's own files alone.

    Raises:
        BadCheckpoint: its config names code of the Hub.
        ValueError, OSError, ...: transformers has no class for it, or cannot load it.
    """
    with no_code(folder):
        return auto.from_pretrained(str(folder), **OURS, **options)


def model_of(auto: Any, config: Any, **options: Any) -> Any:
    """Build a model without weights of a config that was checked, by one of transformers' Auto classes."""
    with no_code():
        return auto.from_config(config, trust_remote_code=False, **options)


def tokenizer_from(folder: Path | str) -> Any:
    """Load a tokenizer of transformers. Errors as of `model_from`."""
    from transformers import AutoTokenizer

    with no_code(folder):
        return AutoTokenizer.from_pretrained(str(folder), **OURS)


def generation_config_from(folder: Path | str) -> Any:
    """Load a generation_config.json. Errors as of `model_from`."""
    from transformers import GenerationConfig

    with no_code(folder):
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)


def mlx_lm_utils() -> Any:
    """Import mlx_lm.utils without its change of the process's limit of open files.

    mlx-lm 0.32 sets that limit to 2048, and the hard limit to 4096, when it is imported: this fails where fewer are
    allowed, and where more are, it lowers the hard limit, which cannot be raised again.
    """
    import resource

    honest = resource.setrlimit
    resource.setrlimit = lambda *given: None
    try:
        return import_module("mlx_lm.utils")
    finally:
        resource.setrlimit = honest


def mlx_model_from(folder: Path, *, is_lazy: bool) -> Any:
    """Load a model of mlx-lm's own classes; a `model_file` of the config is refused. Errors as of `model_from`."""
    with no_code(folder):
        return mlx_lm_utils().load_model(folder, lazy=is_lazy)[0]


def mlx_tokenizer_from(folder: Path) -> Any:
    """Load a tokenizer by mlx-lm, which uses that of transformers. Errors as of `model_from`."""
    with no_code(folder):
        return mlx_lm_utils().load_tokenizer(folder, dict(OURS))


def hqq_model_from(folder: Path, dtype: Any, device: str) -> Any:
    """Load a qmodel.pt by hqq. Errors as of `model_from`."""
    hqq: Any = import_module("hqq.models.hf.base")
    with no_code(folder):
        return hqq.AutoHQQHFModel.from_quantized(str(folder), compute_dtype=dtype, device=device)


@contextmanager
def no_code(folder: Path | str | None = None) -> Iterator[None]:
    """Within the block, libraries refuse a checkpoint's code wherever they would ask; one thread at a time.

    Nor do they find the adapter_config.json of an adapter that is beside a model.

    Raises:
        BadCheckpoint: a config in `folder` names code of the Hub.
        BadSpec: a config asks for FlashAttention, which is not installed.
    """
    for path in sorted(each for name in CONFIGS for each in Path(str(folder)).glob(name)) if folder is not None else ():
        if path.is_file() and path.stat().st_size <= LONGEST:
            # What is no JSON, the library refuses in its own words.
            try:
                found = json.loads(path.read_bytes())
            except (ValueError, RecursionError):
                continue
            check_config(found, str(path))
    with _lock, ExitStack() as changes:
        for module, name, value in CHANGES:
            changes.enter_context(_changed(import_module(module), name, value))
        try:
            yield
        except ImportError as error:
            if "flash" not in str(error).lower():
                raise
            where = "config.json" if folder is None else folder
            raise BadSpec(
                f"{where}: attn_implementation asks for FlashAttention, which is not installed here, or not for this"
                " device; remove it from config.json"
            ) from error


@contextmanager
def _changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, a module's variable has another value, if it has that variable at all."""
    if not hasattr(module, name):
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def check_config(config: Any, where: str = "config.json") -> None:
    """Check that a config names no code of the Hub, at any depth.

    Raises:
        BadCheckpoint: it does.
    """
    # Not by calls of itself: a config may nest deeper than Python calls.
    left: list[tuple[Any, str | None]] = [(config, None)]  # values, and the setting of a kernel that each is of
    while left:
        value, kernel = left.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                is_kernel = kernel is None and any(each in str(key) for each in KERNELS)
                left.append((inner, str(key) if is_kernel else kernel))
        elif isinstance(value, list | tuple):
            left += [(inner, kernel) for inner in value]
        elif kernel is not None and isinstance(value, str) and "/" in value:
            raise BadCheckpoint(
                f"{where}: {kernel:.80} is {value!r:.80}, code of the Hub, which is never run; remove it"
            )


def _no_adapter(*given: Any, **options: Any) -> None:
    """Stand for transformers' find_adapter_config_file, where there is none to be found."""


def _none_here() -> bool:
    """Stand for transformers' is_kernels_available: without it, code of the Hub replaces what is not installed."""
    return False


# What differs in transformers within `no_code`. The time is the seconds for which it waits for an answer whether code
# may run: with 0, it does not ask.
CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("transformers.dynamic_module_utils", "TIME_OUT_REMOTE_CODE", 0),
    ("transformers.modeling_utils", "is_kernels_available", _none_here),
    ("transformers.models.auto.auto_factory", "find_adapter_config_file", _no_adapter),
    ("transformers.integrations.peft", "find_adapter_config_file", _no_adapter),
)
