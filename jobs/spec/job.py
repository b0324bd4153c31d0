"""The request of a job: an immutable tree of validated settings, which need no further checks.

Names are those of conf/, and `--help` shows every field's description. Paths are absolute.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import Field, ValidationError, field_validator, model_validator

from jobs.spec.base import OUTPUTS, SIZE, Columns, FloatName, Format, Location, Source, Spec, bytes_of
from jobs.spec.cluster import ClusterSpec
from jobs.spec.names import output_name
from jobs.spec.store import StoreSpec
from jobs.spec.strategy import StrategySpec
from jobs.spec.tracking import TrackingSpec
from jobs.spec.verify import VerifySpec
from loaders.architectures.family import ROLES
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.faults import sentences
from loaders.near_misses import unknown_setting
from loaders.presets.auto import QuantSpec
from loaders.presets.settings import Quant
from loaders.rules.next_tokens import NextTokens
from loaders.rules.rule import Rule
from loaders.storage.address import Address
from loaders.storage.settings import StoreSettings

MB = 1_000_000
# Metrics that a sweeper may search by: those that every job has, and those of verify=logits and verify=embeddings.
JUDGED = {
    "logits": ("quality/kl", "quality/perplexity", "quality/perplexity_ratio", "quality/top1"),
    "embeddings": ("quality/cosine", "quality/pooled_cosine", "quality/hidden_error"),
}
OBJECTIVES = (
    "error/relative", "error/worst", "error/max", "size/bits_per_weight", "size/output_bytes", "time/wall_s",
    "load/gigabytes_per_second", "load/peak_anonymous_bytes", *(name for kind in JUDGED.values() for name in kind),
)  # fmt: skip


class ModelSpec(Spec):
    """conf/model: the checkpoint to read."""

    name: str | None = Field(description="names the output; the folder's name by default")
    path: Source | None = Field(description="the checkpoint: a folder, a URL, or OWNER/NAME of the Hub")
    hub_id: str | None = Field(default=None, description="the repository of the Hub that is read if there is no path")
    revision: str | None = Field(default=None, description="the revision of hub_id; null: main; quote it")
    components_to_quantize: tuple[str, ...] | None = Field(
        default=None, description="a pipeline of diffusers: which components; null: transformer, unet, text encoders"
    )

    @property
    def address(self) -> Address:
        """Where the checkpoint is.

        Raises:
            BadSpec: that was not said.
        """
        if self.path is not None:
            return Address.of(self.path)
        if self.hub_id is None:
            raise BadSpec("model.path: missing; give model.path=DIR, the folder of the checkpoint, or hf://OWNER/NAME")
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return Address.of(f"hf://{self.hub_id}{revision}")

    @model_validator(mode="after")
    def _revision_has_a_repository(self) -> ModelSpec:
        # A preset's revision beside a path is another matter: the path says where its repository lies instead.
        if self.revision is not None and self.path is not None and self.hub_id is None:
            raise ValueError("revision is of hub_id, and not used with a path; give path=hf://OWNER/NAME@REVISION")
        return self

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[\w.\-]+", name):
            raise ValueError("letters, digits, '.', '_' and '-' only: it becomes a folder's name")
        return name


class SourceSpec(Spec):
    """conf/source: which files of the checkpoint are read."""

    container: Literal["auto", "safetensors", "packed", "pytorch", "gguf"] = Field(
        description="which weight files to read"
    )


class TransformSpec(Spec):
    """conf/transform: changes of the model itself."""

    kind: Literal["none", "block_expansion", "merge_lora"] = "none"
    num_blocks: int | None = Field(
        default=None, ge=1, description="block_expansion: new decoder blocks; must divide the model's number of blocks"
    )

    path: Source | None = Field(
        default=None, description="merge_lora: the folder of an adapter of peft, which is added to the weights"
    )

    @model_validator(mode="after")
    def _settings_belong_to_their_kind(self) -> TransformSpec:
        if (self.kind == "block_expansion") != (self.num_blocks is not None):
            raise ValueError("num_blocks belongs to block_expansion, which needs it")
        if (self.kind == "merge_lora") != (self.path is not None):
            raise ValueError("path belongs to merge_lora, which needs it: the adapter's folder")
        return self

    @property
    def adapter(self) -> Address | None:
        """Where the adapter to merge is."""
        return None if self.path is None else Address.of(self.path)

    @property
    def label(self) -> str:
        """What it adds to the output's default name."""
        if self.adapter is not None:
            return f"-{self.adapter.name}"
        return f"-plus{self.num_blocks}" if self.num_blocks else ""


class RuleSpec(Spec):
    """One of `rules`: all given conditions must hold, and the first rule that matches a tensor decides about it."""

    action: Literal["quantize", "keep", "cast", "drop"]
    name: str | None = Field(default=None, description="a regular expression, searched in the tensor's name")
    shape: tuple[int | None, ...] | None = Field(default=None, description="one entry a dimension, null for any")
    dtype: str | None = Field(default=None, description="a dtype such as bfloat16")
    role: str | None = Field(default=None, description=f"one of {', '.join(ROLES)}")
    cast_to: FloatName | None = Field(default=None, description="with action cast: the new dtype")
    quant: dict[str, Any] | None = Field(
        default=None, description="with action quantize: settings of quant that differ for these tensors"
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_pattern(cls, name: str | None) -> str | None:
        try:
            re.compile(name or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return name

    @field_validator("dtype")
    @classmethod
    def _dtype_is_known(cls, dtype: str | None) -> str | None:
        if dtype is not None and not any(dtype in (d.name, d.torch) for d in DTYPES.values()):
            raise ValueError(f"unknown dtype; known: {', '.join(d.torch for d in DTYPES.values())}")
        return dtype

    @field_validator("role")
    @classmethod
    def _role_is_known(cls, role: str | None) -> str | None:
        if role is not None and role not in ROLES:
            raise ValueError(f"unknown role; known: {', '.join(ROLES)}")
        return role

    @model_validator(mode="after")
    def _is_whole(self) -> RuleSpec:
        if self.name is None and self.shape is None and self.dtype is None and self.role is None:
            raise ValueError("expected at least one of name, shape, dtype, role: this would match everything")
        if self.action == "cast" and self.cast_to is None:
            raise ValueError("cast_to is missing: action cast needs the new dtype")
        if self.action != "cast" and self.cast_to is not None:
            raise ValueError("cast_to belongs to action cast, and to no other")
        if self.quant is not None and self.action != "quantize":
            raise ValueError("quant belongs to action quantize, and to no other")
        return self

    def rule(self, label: str, quant: Quant) -> Rule:
        dtype = next((d.name for d in DTYPES.values() if self.dtype in (d.name, d.torch)), None)
        cast_to = next((d.name for d in DTYPES.values() if d.torch == self.cast_to), None)
        return Rule(
            action=self.action,
            why="your rule",
            name=self.name,
            shape=self.shape,
            dtype=None if dtype is None else (dtype,),
            role=None if self.role is None else (self.role,),
            cast_to=cast_to,
            label=label,
            scheme=None if self.quant is None else quant.varied(self.quant),
        )


class OutputSpec(Spec):
    """conf/output: what is written, and where."""

    root: Location = Field(description="the folder of outputs without a path, and, if local, of the tracking store")
    path: Location | None = Field(
        description="the output's folder; root / model-quant by default, with what differs from the preset"
    )
    layout: Literal["auto", "hf", "hqq", "mlx", "gguf", "packed", "diffusers"] = Field(
        description="the consumer whose tensor names and config are written; auto: the scheme's engine"
    )
    container: Literal["auto", "safetensors", "packed", "pytorch", "gguf"] = Field(
        description="the kind of weight files; auto: the layout's usual one"
    )
    dtype: Literal["auto", "source", "bfloat16", "float16", "float32"] = Field(
        default="source",
        description="the dtype of what is not quantized; source: as it is stored; auto: so, but bfloat16 from a GGUF",
    )
    max_shard_size: str | None = Field(
        default=None,
        description="the most that a weight file holds, such as 5GB or 512MiB; null: what a unit of work writes",
    )
    split: bool = Field(default=False, description="gguf: a file for each unit of work, rather than one")
    card: bool = Field(
        default=True, description="write a model card, README.md; false: the source's is copied as it is, if it has one"
    )
    overwrite: bool = Field(
        description="replace an earlier output of weightmill at this path; a sweep keeps what the same job made before"
    )
    suffix: str = Field(default="", description="added to the default name; a sweep sets it")
    named: tuple[str, ...] = Field(
        default=(), description="settings of quant that are in the default name in any case; a sweep sets it"
    )
    private: bool = Field(default=False, description="hf://: a repository is made private; a public one refused")
    branch: str | None = Field(default=None, min_length=1, description="hf://: the branch to commit to; null: main")
    commit_message: str | None = Field(default=None, min_length=1, description="hf://: the title of the commit")
    journal: Location | None = Field(
        default=None,
        description="hf://: where the journal is, a folder or s3://, gs://, az:// with a prefix; null: in your cache",
    )

    # Before the type: a number without a unit is no text, but what it lacks is the unit.
    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _size_is_a_size(cls, size: object) -> object:
        is_size = isinstance(size, str) and SIZE.fullmatch(size) is not None and bytes_of(size) >= 1
        if size is not None and not is_size:
            raise ValueError("expected a size such as 5GB or 512MiB")
        return size

    @property
    def max_shard_bytes(self) -> int | None:
        """`max_shard_size` in bytes."""
        return None if self.max_shard_size is None else bytes_of(self.max_shard_size)

    @property
    def local_root(self) -> Path:
        """The local folder of tracking, measurements and plots: `root`, or ./outputs if `root` is not local."""
        root = Address.of(self.root)
        return root.path if root.is_local else Path.cwd() / OUTPUTS


class BackendSpec(Spec):
    """conf/backend: the device on which encoders run."""

    kind: Literal["auto", "cpu", "cuda", "mps", "mlx"]

    @property
    def asked(self) -> str:
        """The backend that is asked for: the CPU, if the choice is left open."""
        return "cpu" if self.kind == "auto" else self.kind


class JobSpec(Spec):
    """The settings of a job."""

    model: ModelSpec
    source: SourceSpec
    transform: TransformSpec = Field(default_factory=TransformSpec)
    quant: QuantSpec
    unit_mb: float = Field(
        gt=0,
        description="source megabytes (1e6 bytes) per unit of work: decides what a crash costs, and the size of files",
    )
    rules: tuple[RuleSpec, ...] = Field(description="rules that decide about tensors before the engine's own")
    mtp: NextTokens = Field(
        default="auto",
        description="layers for multi-token prediction: as they are, as the others, or none; auto: as the engine does",
    )
    output: OutputSpec
    strategy: StrategySpec
    store: StoreSpec = Field(default_factory=StoreSpec)
    backend: BackendSpec
    cluster: ClusterSpec
    tracking: TrackingSpec
    verify: VerifySpec
    lint: Literal["fail", "warn"] = Field(
        default="fail",
        description="on a fault (the engine fails, or computes something else): fail the job, or warn and go on",
    )
    objective: tuple[str, ...] = Field(
        default=("error/relative",),
        description="metrics that a job returns to Hydra's sweeper, for it to search by",
    )
    format: Format = Field(description="text for people; json: one document on standard output")
    columns: Columns = "fit"

    @field_validator("objective")
    @classmethod
    def _objectives_are_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(f"expected some of {', '.join(OBJECTIVES)}")
        return names

    @model_validator(mode="after")
    def _objectives_are_measured(self) -> JobSpec:
        for kind, names in JUDGED.items():
            if self.verify.kind != kind and (wanted := [name for name in self.objective if name in names]):
                raise ValueError(f"objective: {wanted[0]} is measured with verify={kind}")
        return self

    @model_validator(mode="after")
    def _what_is_of_the_hub_is_for_the_hub(self) -> JobSpec:
        output = self.output
        given = {"private": output.private, "branch": output.branch, "commit_message": output.commit_message}
        if not (output.path or output.root).startswith("hf://"):
            for name, value in {**given, "journal": output.journal}.items():
                if value:
                    raise ValueError(
                        f"output.{name}: it is for outputs on the Hub, such as output.path=hf://OWNER/NAME"
                    )
        if output.branch is not None and "@" in (output.path or ""):
            raise ValueError("output.branch: output.path names a branch already, after its @")
        return self

    @model_validator(mode="after")
    def _a_server_reaches_what_it_registers(self) -> JobSpec:
        is_server = (self.tracking.uri or "").startswith("http")
        if self.tracking.register is not None and is_server and self.output_address.is_local:
            raise ValueError(
                "tracking.register: a tracking server registers no folder of this machine; give an output.path in a"
                " store, such as s3://BUCKET/OUT"
            )
        return self

    @model_validator(mode="after")
    def _original_is_the_merged_model(self) -> JobSpec:
        calibration = getattr(self.quant, "calibration", None)
        if self.transform.kind == "merge_lora" and (self.verify.kind in JUDGED or calibration is not None):
            what = f"verify={self.verify.kind}" if self.verify.kind in JUDGED else "quant.calibration"
            raise ValueError(
                f"transform: {what} runs the model at model.path, which is not the merged one; write the merged model"
                " with quant=none first, and give that as model.path"
            )
        return self

    @model_validator(mode="after")
    def _rules_fit_the_quant(self) -> JobSpec:
        for index, rule in enumerate(self.rules):
            try:
                rule.rule("", self.quant)
            except ValidationError as error:
                raise ValueError("; ".join(_settings_said(f"rules[{index}].quant", self.quant, error))) from None
        return self

    @property
    def source_address(self) -> Address:
        return self.model.address

    @property
    def model_name(self) -> str:
        return self.model.name or self.source_address.title

    @property
    def output_address(self) -> Address:
        branch = "" if self.output.branch is None else f"@{quote(self.output.branch, safe='')}"
        if self.output.path is not None:
            return Address.of(f"{self.output.path.rstrip('/')}{branch}" if branch else self.output.path)
        return Address.of(self.output.root) / f"{output_name(self)}{branch}"

    @property
    def store_settings(self) -> StoreSettings:
        """How stores are reached, and what outputs on the Hub are to be like."""
        return replace(
            self.store.settings,
            read_limit=self.cluster.read_limit,
            journal=self.output.journal,
            private=self.output.private,
            commit_message=self.output.commit_message or f"{self.quant.name} of {self.model_name}, by weightmill",
        )

    @property
    def own_rules(self) -> tuple[Rule, ...]:
        return tuple(rule.rule(f"rules[{index}]", self.quant) for index, rule in enumerate(self.rules))

    def resolved(self) -> dict[str, Any]:
        """Return all settings as JSON values, for records and tracking."""
        return self.model_dump(mode="json")


def _settings_said(place: str, quant: Quant, error: ValidationError) -> list[str]:
    """Say what is wrong with a rule's own settings of the quantization."""
    faults, spec = error.errors(), type(quant)
    known = [name for name in spec.model_fields if name not in ("kind", "name")]
    unknown = [str(fault["loc"][-1]) for fault in faults if fault["type"] == "extra_forbidden"]
    others = [fault for fault in faults if fault["type"] != "extra_forbidden"]
    return [
        *(f"{place}.{name}: {unknown_setting(name, known)}" for name in unknown),
        *(f"{place}{'.' if re.match('[a-z_]+: ', said) else ': '}{said}" for said in sentences(spec, others)),
    ]
