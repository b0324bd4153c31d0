"""The metadata of a model card as the Hub wants it, and what is known of where the source comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from jobs.output.card_block import FENCE, FRONT_BEGIN, FRONT_END
from jobs.output.report import Report
from jobs.planning.plan import TargetPlan
from jobs.report.loading import Loading
from jobs.report.markdown import code
from jobs.report.source_card import SourceCard, Value
from loaders.storage.address import Address
from loaders.storage.hub.store import Place

# The Hub's cache on a machine: the folder of a snapshot says which model, and at which commit.
CACHED = re.compile(r"[\\/]models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/]([0-9a-f]{40})$")
# Tags about engines and formats, which hold for the source alone.
TAGS_OF_FORMATS = (
    "transformers", "diffusers", "safetensors", "mlx", "gguf", "hqq", "bitsandbytes", "compressed-tensors", "vllm",
    "llama.cpp", "awq", "gptq", "fp8", "nvfp4", "mxfp4", "8-bit", "6-bit", "5-bit", "4-bit", "3-bit", "2-bit",
    "quantized",
)  # fmt: skip
TAGGED = ("mlx", "gguf")  # libraries whose models are also found by a tag


@dataclass(frozen=True, slots=True)
class Origin:
    """The source by a name that tells nothing of a machine, and on the Hub its id and revision or commit."""

    name: str
    hub_id: str | None = None
    revision: str | None = None

    @property
    def title(self) -> str:
        return Address.of(self.name).title

    @property
    def shown(self) -> str:
        if self.hub_id is None:
            return code(self.name)
        at = "" if self.revision is None else f" at {code(self.revision)}"
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id}){at}"


def origin_of(report: Report) -> Origin:
    """Return where an output's source comes from, as far as its address or its preset tells."""
    address, model = Address.of(report.source.path), report.job["model"]
    if address.scheme == "hf":
        place = Place.of(address)
        return Origin(place.repo, place.repo, place.revision)
    if (cached := CACHED.search(address.text)) is not None:
        return Origin(f"{cached[1]}/{cached[2]}", f"{cached[1]}/{cached[2]}", cached[3])
    name = address.name if address.is_local else address.text
    return Origin(name, model.get("hub_id"), model.get("revision"))


def front_matter(report: Report, target: TargetPlan, theirs: SourceCard, loading: Loading) -> Iterator[str]:
    """Yield the lines of the front matter. What depends on where the source was stands in a block of its own."""
    origin, known = origin_of(report), dict(theirs.metadata)
    base: dict[str, Value | None] = {key: known.pop(key, None) for key in ("base_model", "base_model_relation")}
    tags = known.pop("tags", [])
    own = [loading.library] if loading.library in TAGGED else []
    kept = [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag.lower() not in TAGS_OF_FORMATS]
    ours = {
        **({} if loading.library is None else {"library_name": loading.library}),
        "tags": list(dict.fromkeys([*kept, *own, "weightmill"])),
    }
    if origin.hub_id is not None:
        is_made_anew = report.totals.changed is not None or target.target.layout.name not in ("hf", "diffusers")
        is_quantized = is_made_anew and report.job["transform"]["kind"] == "none"
        base = {"base_model": origin.hub_id, "base_model_relation": "quantized" if is_quantized else None}
    yield FENCE
    yield _yaml({**known, **ours})
    yield FRONT_BEGIN
    yield from [_yaml(found)] if (found := {key: value for key, value in base.items() if value is not None}) else []
    yield FRONT_END
    yield FENCE


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1 << 20).rstrip("\n")
