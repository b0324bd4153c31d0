"""Allocation: choosing a mix within a budget, from the candidates of each tensor with their bytes and errors. Pure.

jobs/mixed_precision/search.py has the errors measured; loaders/rules/knapsack.py solves the optimization.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.mixed_precision.candidate_errors import Loss
from jobs.planning.build import make_plan
from jobs.planning.engine_rules import engine_rules, formed_sources
from jobs.planning.plan import Plan, TargetPlan
from jobs.planning.targets import Target, target_of
from jobs.spec.job import JobSpec
from loaders.architectures.family import natural_key
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.limits import MOST_NUMBERS
from loaders.presets.auto import AutoQuant, Chosen
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.ggml import Ggml
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.quantization.schemes.mlx_float import MlxFloat
from loaders.rules.candidates import KEEP, WHY, CandidateMix, ChosenMix, is_open
from loaders.rules.decide import decide
from loaders.rules.knapsack import Choice, Item, Option, choose, least_size
from loaders.rules.rule import Decision
from loaders.tensors.logical_tensor import LogicalTensor

GB = 1_000_000_000
# Attempts to meet the budget. Headers and padding depend on the mix, so they are known only afterwards: if a mix
# exceeds the budget, the excess is taken off the room for tensors, and another mix is chosen.
TRIES = 8
# How much a weight's relative error matters if nothing but its name is known: see `prior`.
PRIORS = (
    ("q_proj", 0.4), ("k_proj", 2.0), ("v_proj", 6.0), ("o_proj", 1.5), ("down_proj", 2.0), ("w2", 2.0),
)  # fmt: skip
HEAD_PRIOR = 4.0


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices for a mix: a plan with one target for each candidate, and the tensors that each may take."""

    spec: JobSpec
    quant: AutoQuant
    checkpoint: Checkpoint
    plan: Plan
    formed: tuple[LogicalTensor, ...]  # the plan's tensors as the engine holds them
    open: Mapping[str, frozenset[str]]  # by candidate, the tensors that it may take
    kept_bytes: Mapping[str, int]  # by tensor, its stored bytes if it is not quantized

    @property
    def tensors(self) -> dict[str, LogicalTensor]:
        """The tensors that some candidate may take, by name."""
        taken = frozenset().union(*self.open.values())
        return {tensor.name: tensor for tensor in self.formed if tensor.name in taken}

    @property
    def fixed_bytes(self) -> int:
        """The bytes of the tensors that no candidate may take, which are stored the same in every mix."""
        tensors = self.tensors
        return sum(size for name, size in self.kept_bytes.items() if name not in tensors)

    def sizes(self, candidate: str) -> dict[str, int]:
        """Return the stored bytes of the tensors that a candidate may take."""
        stored = self.plan.targets[candidate].stored
        return {name: sum(slot.size for slot in stored[name]) for name in self.open[candidate]}


@dataclass(frozen=True)
class Mixed:
    """A chosen mix: the job with it, its plan, and its size and error."""

    spec: JobSpec
    target: TargetPlan
    choice: Choice
    errors: Mapping[str, Mapping[str, float]]  # weighted errors by candidate and tensor


def choices_of(spec: JobSpec, quant: AutoQuant, checkpoint: Checkpoint) -> Choices:
    """Plan all candidates of a job with quant=auto.

    Raises:
        BadSpec: a candidate cannot take this checkpoint, or no tensor is left to choose for.
    """
    usual = target_of(spec)
    mixes = {name: CandidateMix(each.scheme, each.mix) for name, each in quant.candidates.items()}
    targets = [
        Target(
            id=name, scheme=mix.scheme, rules=usual.rules, compute_dtype=usual.compute_dtype,
            mix=mix, layout_name=usual.layout_name, container_name=usual.container_name, naming=usual.naming,
            new_blocks=usual.new_blocks,
        )
        for name, mix in mixes.items()
    ]  # fmt: skip
    plan = make_plan(checkpoint, targets, spec.unit_mb)
    taken = {name: frozenset(d.tensor.name for d in plan.targets[name].decisions if is_open(d)) for name in mixes}
    every = frozenset().union(*taken.values())
    if not every:
        raise BadSpec("quant.among: the candidates quantize no tensor of this checkpoint that rules leave to them")
    first = next(iter(mixes.values()))
    keeping = ChosenMix(((first, frozenset()),), every)
    sources = formed_sources(usual, plan.checkpoint, plan.sources)
    rules = engine_rules(replace(usual, scheme=first.scheme, mix=keeping), plan.checkpoint, sources)
    decisions = decide(sources.tensors, first.scheme, usual.rules, rules)
    placed = usual.layout.place(plan.checkpoint, decisions)
    kept = {each.tensor.name: sum(t.spec.size for t in each.stored.values()) for each in placed}
    return Choices(
        spec=spec, quant=quant, checkpoint=checkpoint, plan=plan, formed=sources.tensors, open=taken, kept_bytes=kept
    )


# --- what a mix is chosen from


def partners(choices: Choices) -> dict[str, list[str]]:
    """Group the tensors that must have the same scheme: the experts of one stack, and for vLLM those that it fuses
    (q/k/v, gate/up, a layer's experts).
    """
    stacks: dict[str, str] = {}
    for target in choices.plan.targets.values():
        stacks |= {name: slot.within[0] for name, slots in target.stored.items() for slot in slots[:1] if slot.within}
    groups: dict[str, list[str]] = {}
    for name, tensor in choices.tensors.items():
        fused = name
        if choices.quant.engine == "vllm":
            fused = f"{tensor.block}, experts" if tensor.role == "expert" else tensor.group or name
        groups.setdefault(stacks.get(name, fused), []).append(name)
    return groups


def items_of(choices: Choices, errors: Mapping[str, Mapping[str, float]]) -> tuple[Item, ...]:
    """Return a knapsack item for each group of partners. An option's error is in the unit of the weighting."""
    sizes = {name: choices.sizes(name) for name in choices.open}
    items = []
    for group, members in partners(choices).items():
        options = [
            Option(name, sum(sizes[name][m] for m in members), sum(errors[name][m] for m in members))
            for name in choices.open
            if choices.open[name].issuperset(members)
        ]
        if choices.quant.keep or not options:
            options.append(Option(KEEP, sum(choices.kept_bytes[m] for m in members), 0.0))
        items.append(Item(group, tuple(options)))
    return tuple(items)


def errors_of(choices: Choices, losses: Mapping[str, Mapping[str, Loss]]) -> dict[str, dict[str, float]]:
    """Return weighted errors by candidate and tensor: in nats per token with a calibration, else relative ones.

    Tensors that a calibration does not cover are weighted by `prior`, scaled so that both weightings agree on the
    tensors that it does cover.
    """
    tensors = choices.tensors
    tied = not any(tensor.role == "head" for tensor in choices.formed)
    weights = {name: prior(tensor, is_tied=tied) * tensor.spec.numel for name, tensor in tensors.items()}
    whole = sum(weights.values())
    free = {
        name: {t: weights[t] / whole * _relative2(loss) for t, loss in found.items()} for name, found in losses.items()
    }
    if choices.quant.calibration is None:
        return free
    known = [(free[name][t], e.weighted) for name, found in losses.items() for t, e in found.items() if e.weighted]
    rest = sum(each for each, _ in known)
    ratio = sum(weighted for _, weighted in known) / rest if rest else 1.0
    return {
        name: {t: ratio * free[name][t] if loss.weighted is None else loss.weighted for t, loss in found.items()}
        for name, found in losses.items()
    }


def _relative2(loss: Loss) -> float:
    return loss.error.error2 / loss.error.source2 if loss.error.source2 else 0.0


def prior(tensor: LogicalTensor, *, is_tied: bool) -> float:
    """Return how much a weight's relative error matters, if nothing but its name is known.

    It is a table, as the engines' own mixes are: value and down projections and the output projection matter more. The
    numbers were measured on the demo model and rounded. On another model on which they were not tuned (Qwen3, another
    text), the KL divergence of mixes weighted by them is 0.84 (MLX) and 0.86 (GGUF) times that of a uniform scheme of
    the same size; with a calibration it is 0.76 and 0.77 times. Without the table, by relative errors and sizes alone,
    mixes were worse than a uniform scheme: 1.0 to 1.3 times. `weightmill bench budget` measures these ratios.
    """
    if tensor.role == "head" or (tensor.role == "embedding" and is_tied):
        return HEAD_PRIOR
    return next((weight for part, weight in PRIORS if re.search(rf"\b{part}\b", tensor.name)), 1.0)


# --- the choice


def check_budget(choices: Choices) -> None:
    """Check a budget before anything is measured.

    Raises:
        BadSpec: the smallest possible mix exceeds the budget.
    """
    items = items_of(choices, {name: dict.fromkeys(taken, 0.0) for name, taken in choices.open.items()})
    if least_size(items) > budget_bytes(choices) - choices.fixed_bytes:
        raise BadSpec(_too_little(choices, items))


def choose_mix(choices: Choices, losses: Mapping[str, Mapping[str, Loss]]) -> Mixed:
    """Choose the mix with the least weighted error within the budget, including headers and padding of files.

    Raises:
        BadSpec: no mix is within the budget.
    """
    errors = errors_of(choices, losses)
    items = items_of(choices, errors)
    budget = budget_bytes(choices)
    room = budget - choices.fixed_bytes
    for _ in range(TRIES):
        if least_size(items) > room:
            break
        choice = choose(items, room)
        mixed = _mixed(choices, items, choice, errors)
        excess = counted_bytes(choices.quant, mixed.target) - budget
        if excess <= 0:
            return mixed
        room -= excess
    raise BadSpec(_too_little(choices, items))


def budget_bytes(choices: Choices) -> int:
    """Return the budget in the bytes that `counted_bytes` counts."""
    quant = choices.quant
    if quant.target_gb is not None:
        return int(quant.target_gb * GB)
    assert quant.target_bits is not None
    return int(min(quant.target_bits * _parameters(choices) / 8, float(MOST_NUMBERS)))


def counted_bytes(quant: AutoQuant, target: TargetPlan) -> int:
    """Return the bytes that the budget limits: with target_gb those of weight files, with target_bits of tensors."""
    return target.weight_bytes if quant.target_gb is not None else target.tensor_bytes


def _parameters(choices: Choices) -> int:
    return next(iter(choices.plan.targets.values())).parameters


def _mixed(choices: Choices, items: Sequence[Item], choice: Choice, errors: Mapping[str, Mapping[str, float]]) -> Mixed:
    groups, logicals = partners(choices), choices.tensors
    tensors: dict[str, list[str]] = {}
    for item, option in zip(items, choice.options, strict=True):
        tensors.setdefault(option.label, []).extend(groups[item.name])
    order = sorted(tensors, key=lambda label: -sum(logicals[name].spec.numel for name in tensors[label]))
    chosen = Chosen(
        tensors={label: tuple(sorted(tensors[label], key=natural_key)) for label in order},
        weighting="sizes and roles" if choices.quant.calibration is None else "the Fisher information of a calibration",
        error=choice.error,
        bound=min(choice.bound, choice.error),
    )
    quant = choices.quant.model_copy(update={"chosen": chosen})
    spec = choices.spec.model_copy(update={"quant": quant})
    plan = make_plan(choices.checkpoint, [target_of(spec)], spec.unit_mb)
    [target] = plan.targets.values()
    return Mixed(spec, target, choice, errors)


def _too_little(choices: Choices, items: Sequence[Item]) -> str:
    quant, parameters = choices.quant, _parameters(choices)
    least = choices.fixed_bytes + least_size(items)
    uniform = {name: counted_bytes(quant, target) for name, target in choices.plan.targets.items()}
    if quant.target_gb is not None:
        extra = min(t.weight_bytes - t.tensor_bytes for t in choices.plan.targets.values())
        sizes = ", ".join(f"{name} {size / GB:.4g}" for name, size in uniform.items())
        return (
            f"quant.target_gb: {quant.target_gb:g} GB cannot be met: the least possible is about"
            f" {(least + extra) / GB:.4g} GB; all of one kind: {sizes}"
        )
    sizes = ", ".join(f"{name} {size * 8 / parameters:.3f}" for name, size in uniform.items())
    return (
        f"quant.target_bits: {quant.target_bits:g} bits per weight cannot be met: the least possible is"
        f" {least * 8 / parameters:.3f}; all of one kind: {sizes}"
    )


# --- the mix as rules


def rules_of(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """Return the mix as `rules` of a job that needs no measurements, for a preset of the engine (`base_preset`)."""
    found: dict[tuple[str, str], list[str]] = {}
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    names = [d.tensor.name for d in decisions]
    for decision in decisions:
        if decision.rule.names is None or not decision.rule.why.startswith(WHY):
            continue
        given = {} if decision.scheme is None or decision.action != "quantize" else settings_of_scheme(decision.scheme)
        key = ("quantize" if decision.action == "quantize" else "keep", repr(given))
        settings[key] = given
        found.setdefault(key, []).append(decision.tensor.name)
    return [
        {"action": key[0], "name": pattern, **({"quant": settings[key]} if settings[key] else {})}
        for key, mine in found.items()
        for pattern in patterns(mine, names)
    ]


def settings_of_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return a scheme's settings as the `quant` of a rule states them."""
    if isinstance(scheme, MlxAffine | MlxFloat):
        mode = scheme.mode if isinstance(scheme, MlxFloat) else "affine"
        return {"mode": mode, "bits": scheme.bits, "group_size": scheme.group_size}
    if isinstance(scheme, Ggml):
        return {"type": scheme.type}
    if isinstance(scheme, PackedInt):
        kind = f"w{scheme.bits}a16" + ("" if scheme.symmetric else "_asym")
        return {"preset": kind, "group_size": scheme.group_size}
    return {}


def patterns(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return regular expressions that match exactly `names` among `every` name.

    Names that differ only in the layer's number share an expression.
    """
    templates: dict[str, list[str]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(.*?\.|)(\d+)(\..*)|.*", name).group(1, 2, 3)  # type: ignore[union-attr]
        templates.setdefault(name if number is None else f"{head}\0{tail}", []).append(number or "")
    made = []
    for template, numbers in templates.items():
        head, _, tail = template.partition("\0")
        if not tail:
            made.append(f"^{re.escape(template)}$")
            continue
        whole = re.compile(rf"{re.escape(head)}\d+{re.escape(tail)}")
        all_of = sum(whole.fullmatch(name) is not None for name in every) == len(numbers)
        middle = r"\d+" if all_of else f"(?:{'|'.join(numbers)})"
        made.append(f"^{re.escape(head)}{middle}{re.escape(tail)}$")
    return made


def base_preset(quant: AutoQuant) -> str:
    """Return a preset of conf/quant for the same engine, to which the rules of the mix can be added."""
    return {"mlx": "mlx_int4", "gguf": "gguf_q4_k_m", "vllm": "w4a16"}.get(quant.engine or "", quant.among[0])


def mix_document(quant: AutoQuant, decisions: Sequence[Decision]) -> dict[str, Any]:
    """Describe the mix as JSON for a run's artifacts, with rules that need no measurements."""
    assert quant.chosen is not None
    return {**quant.chosen.model_dump(mode="json"), "quant": base_preset(quant), "rules": rules_of(decisions)}
