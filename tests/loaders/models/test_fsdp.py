"""A model cut over ranks by FSDP, its weights quantized: it trains as the whole model does, and no rank holds it.

All ranks are started once, for the whole file: two together, then four, then such as cannot end well.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli.main import main
from loaders.places import DEMO, ROOT
from tests.making import LLAMA, TORCH_NAMES, weights, write_checkpoint
from tests.processes import start
from tests.test_readme import blocks

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

Task = tuple[str, dict[str, Any]]
Found = Callable[[str, str], list[list[dict[str, Any]]]]  # of a world's name and a task's
PAGE = ROOT / "docs" / "training.md"
MIB = 1 << 20
NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}  # safetensors' for torch's
HIDDEN, INNER, LAYERS = 512, 1408, 16
BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER  # weights
# Beside weights a rank has torch's and Python's own objects, and buffers of gloo: 2 MiB were measured at most.
OWN = 6 * MIB
# Ranks add their shares of a gradient, and a whole batch its rows, in another order; the model computes in bfloat16,
# whose steps are 1/256. Adapters of hqq's own kind in peft begin in float32, ours in the model's dtype.
TOLERANCE = {"nf4": 0.001, "hqq4": 0.002, None: 0.001}

TRAINED: list[tuple[int, str, str | None, str]] = [
    (2, "output", None, "lora"),
    (2, "demo", "hqq4", "dora"),
    (2, "demo", None, "lora"),
    (1, "demo", "nf4", "dora"),
    (1, "demo", "hqq4", "lora"),
]
TRAINED_BY_FOUR = [(2, "demo", "nf4", "dora"), (1, "output", None, "lora")]
EXPANDED: list[tuple[int, str, str | None, dict[str, Any]]] = [
    (2, "demo", "nf4", {"llama_pro_path": "expanded"}),
    (1, "output", None, {"llama_pro_blocks": 1}),
]
HELD = [(2, "nf4"), (1, "nf4"), (2, None)]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"quantize": "nf4"}, {"quantize": None}, "quantize: the ranks disagree: 'nf4' on rank 0, None on rank 1"),
    ({"path": "demo"}, {"path": "output"}, "path: the ranks disagree"),
    ({"path": "demo"}, {"path": "nowhere"}, "path: the ranks disagree"),
    ({"path": "nowhere"}, {"path": "nowhere"}, "nowhere"),
    ({"dtype": "float16"}, {}, "dtype: the ranks disagree: 'float16' on rank 0, not given on rank 1"),
    ({"fsdp": 1}, {"fsdp": 2}, "fsdp: the ranks disagree: 1 on rank 0, 2 on rank 1"),
    ({"fsdp": 3}, {"fsdp": 3}, "fsdp: expected 1 (FullyShardedDataParallel) or 2 (fully_shard), found 3"),
    ({"quantize": "int8"}, {"quantize": "int8"}, "quantize: weights of int8 cannot be cut by FSDP"),
    ({"quantize": "hqq3"}, {"quantize": "hqq3"}, "quantize: weights of hqq with 3 bits cannot be cut by FSDP"),
    ({"quantize": "nf5"}, {"quantize": "nf5"}, "quantize: unknown 'nf5'"),
    ({"quantize": "nf4"}, {"quantize": "nf5"}, "rank 1: quantize: unknown 'nf5'"),
    ({"path": "output", "quantize": "nf4"}, {"path": "output", "quantize": "nf4"}, "is quantized already"),
    ({"path": "int8"}, {"path": "int8"}, "q_proj.weight: weights of int8 cannot be cut by FSDP"),
    ({"path": "odd", "quantize": "nf4"}, {"path": "odd", "quantize": "nf4"}, "are no whole number of torch.float32"),
    ({"strategy": "streaming"}, {"strategy": "streaming"}, "strategy: it is not for a model that is cut"),
    ({"max_memory": {"cpu": 1}}, {"max_memory": {"cpu": 1}}, "max_memory: it is not for a model that is cut"),
    ({"backend": "cuda"}, {"backend": "cuda"}, "backend: it is not for a model that is cut over ranks"),
    ({"fdsp": 2}, {"fdsp": 2}, "fdsp: no such setting"),
]
PLACES = {
    "mesh of two dimensions": "mesh_or_group: expected a mesh of one dimension, found (1, 2)",
    "a number": "mesh_or_group: expected a DeviceMesh or a process group, found 2",
    "nothing returned": "prepare: expected the model that is to be cut, found None; return it",
    "copies": "lm_head.modules_to_save.default.weight is made of weights that are not there yet",
    "casts": "was replaced or changed before its weights are there",
    "other adapters": "prepare (what it made): the ranks disagree",
    "no adapter": "model: it has no adapter of peft to save",
    "saved as a whole": "save_pretrained: the quantized weights are cut over ranks; save_adapter writes its adapter",
    "mixed": "fsdp: the weights of a Linear are of several dtypes, or trained in part (torch.bfloat16, torch.float32)",
    "no blocks": "path: transformers does not say what the blocks of LlamaForCausalLM are",
    "no engine": "quantize: modules of bitsandbytes need it: pip install bitsandbytes",
    "group of others": "mesh_or_group: rank 1 is not of the group",
}
FAILING = [(0, "encoded", "BadCheckpoint: shard 3 is damaged"), (1, "_fill", "rank 1: MemoryError: no room")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo, outputs of jobs from it, and a model of 100 MiB in bfloat16."""
    folder = tmp_path_factory.mktemp("sharded")
    expansion = ["quant=none", "transform=block_expansion", "transform.num_blocks=1"]
    for name, job in {"nf4": ["quant=nf4"], "int8": ["quant=int8"], "expanded": expansion}.items():
        assert main(["run", "model=demo", *job, "cluster=local", "tracking=none", f"output.path={folder / name}"]) == 0
    shutil.copytree(DEMO, folder / "demo")  # where the page's programs look for it
    write_llama(folder / "large", HIDDEN, INNER, LAYERS, "bfloat16")
    write_llama(folder / "odd", 6, 6, 1, "float32")
    made = {name: str(folder / name) for name in ("int8", "expanded", "large", "odd", "nowhere")}
    return {**made, "demo": str(DEMO), "output": str(folder / "nf4"), "folder": str(folder)}


def write_llama(folder: Path, hidden: int, inner: int, layers: int, dtype: str) -> None:
    """Write a Llama whose blocks are all alike."""
    numbers = np.random.default_rng(0).normal(0, 0.02, (inner, hidden)).astype(np.float32)
    square, wide, tall = (weights(each, NAMES[dtype]) for each in (numbers[:hidden], numbers, numbers.T))
    ones = weights(np.ones(hidden), NAMES[dtype])
    tensors = {"model.embed_tokens.weight": square, "lm_head.weight": square, "model.norm.weight": ones}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors |= {f"{name}self_attn.{p}_proj.weight": square for p in "qkvo"}
        tensors |= {f"{name}mlp.{p}_proj.weight": wide for p in ("gate", "up")} | {f"{name}mlp.down_proj.weight": tall}
        tensors |= {f"{name}{p}_layernorm.weight": ones for p in ("input", "post_attention")}
    config = {
        **LLAMA, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": hidden,
        "num_attention_heads": 1, "num_key_value_heads": 1, "dtype": dtype,
    }  # fmt: skip
    write_checkpoint(folder, tensors, config=config)


def worlds(folders: dict[str, str]) -> dict[str, tuple[int, list[Task]]]:
    demo = folders["demo"]
    (_, training), (_, loading) = blocks(PAGE.read_text())

    def trained(world: int, cases: list[tuple[int, str, str | None, str]]) -> list[Task]:
        return [
            ("trains", {"fsdp": fsdp, "path": folders[path], "quantize": quantize, "kind": kind,
                        "folder": f"{folders['folder']}/adapter-{world}-{number}"})
            for number, (fsdp, path, quantize, kind) in enumerate(cases)
        ]  # fmt: skip

    def given(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            name: folders[value] if name in ("path", "llama_pro_path") else value for name, value in settings.items()
        }

    two: list[Task] = [
        *trained(2, TRAINED),
        *(
            ("trains_new_blocks", {"fsdp": fsdp, "path": folders[path], "quantize": quantize, "expanded": given(how)})
            for fsdp, path, quantize, how in EXPANDED
        ),
        ("repacks_nothing", {"path": demo}),
        *(("refused", {"path": demo, "first": given(a), "others": given(b)}) for a, b, _ in REFUSED),
        ("refuses_places", {"path": demo}),
        *(("fails", {"path": demo, "rank": rank, "what": what}) for rank, what, _ in FAILING),
    ]
    # Fresh processes, that cannot take what they freed before.
    held: dict[str, tuple[int, list[Task]]] = {
        f"held-{number}": (
            4,
            [("holds", {"fsdp": fsdp, "path": folders["large"], "quantize": quantize, "before": demo})],
        )
        for number, (fsdp, quantize) in enumerate(HELD)
    }
    return {
        "two": (2, two), "four": (4, trained(4, TRAINED_BY_FOUR)), **held,
        "killed": (2, [("is_killed", {"path": demo})]),
        "alone": (1, [("without_group", {"path": demo})]),
        "program": (2, [("runs_programs", {"folder": folders["folder"], "training": training, "loading": loading})]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(folders: dict[str, str]) -> Found:
    """A function that gives what the ranks of a world found: for each of its tasks of a name, a record a rank."""
    asked = worlds(folders)
    environment = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    process = start("-m", "tests.loaders.models.sharded_ranks", json.dumps(asked), environment=environment)
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
        process.communicate()
    ended = dict(json.loads(line.removeprefix("ENDED ")) for line in out.splitlines() if line.startswith("ENDED "))
    wanted = {world: [0] * count for world, (count, _) in asked.items()} | {"killed": [-signal.SIGKILL, 0]}
    assert ended == wanted, err[-5000:]
    records: dict[tuple[str, int], dict[int, Any]] = {}
    for line in out.splitlines():
        if line.startswith("RESULT "):
            world, number, rank, result = json.loads(line.removeprefix("RESULT "))
            records.setdefault((world, number), {})[rank] = result

    def of(world: str, name: str) -> list[list[dict[str, Any]]]:
        numbers = [number for number, (task, _) in enumerate(asked[world][1]) if task == name]
        return [[result for _, result in sorted(records[world, number].items())] for number in numbers]

    return of


@pytest.mark.parametrize(("world", "cases"), [("two", TRAINED), ("four", TRAINED_BY_FOUR)])
def test_adapters_train_as_on_the_whole_model(world: str, cases: list[Any], found: Found) -> None:
    for case, ranks in zip(cases, found(world, "trains"), strict=True):
        losses, plain = ranks[0]["losses"], ranks[0]["plain_losses"]
        assert all(each["losses"] == losses for each in ranks), case
        assert losses[-1] < 0.9 * losses[0], case
        assert np.allclose(losses, plain, rtol=TOLERANCE[case[2]], atol=0), (case, losses, plain)


@pytest.mark.parametrize(("world", "cases"), [("two", TRAINED), ("four", TRAINED_BY_FOUR)])
def test_adapters_are_saved_and_loaded(world: str, cases: list[Any], found: Found) -> None:
    """By peft into a whole model, and into one that is cut anew."""
    for case, [first, *others] in zip(cases, found(world, "trains"), strict=True):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {*first["files"]}
        assert first["saved"] == 0, case
        assert all(each["resumed"] for each in (first, *others)), case


def test_a_cut_model_computes_the_same_outside_of_training(found: Found) -> None:
    """bitsandbytes would pack its weights anew there, on CPUs with AVX512-BF16."""
    assert all(each["in_eval"] for ranks in found("two", "trains") for each in ranks)
    [ranks] = found("two", "repacks_nothing")
    for each in ranks:
        assert len(each["guarded"]) == 21
        assert not any((*each["guarded"], *each["repacked"]))
        assert each["equal"]


def test_of_an_expanded_model_only_the_new_blocks_are_trained(found: Found) -> None:
    for ranks in found("two", "trains_new_blocks"):
        for rank, each in enumerate(ranks):
            assert abs(each["losses"][0] / each["plain_loss"] - 1) < TOLERANCE["nf4"]  # a new block changes nothing yet
            assert each["losses"][-1] < 0.9 * each["losses"][0]
            assert each["packed"] == 21  # the linear layers of the three old blocks
            assert len(each["trained"]) == (0 if rank else 9)
            assert all(name.startswith("model.layers.3.") for name in each["trained"])
            assert each["changed"] == each["trained"]


def test_no_rank_holds_the_model(folders: dict[str, str], found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the first: it reads a block at a time."""
    for number, (fsdp, quantize) in enumerate(HELD):
        [ranks] = found(f"held-{number}", "holds")
        model = sum(each["held"] for each in ranks) + ranks[0]["states"]
        block = BLOCK * (9 / 16 if quantize else 2)  # half a byte a weight, and a float32 for 64 of them
        part, peak = ranks[0]["held"] + ranks[0]["states"], max(each["peak"] for each in ranks)
        with capsys.disabled():
            print(
                f"\n  fsdp={fsdp} quantize={quantize}: model {model / MIB:.1f} MiB, a rank's part {part / MIB:.1f},"
                f" a block {block / MIB:.1f}, held at most {peak / MIB:.1f}",
                end="",
            )
        for each in ranks:
            # A block as it comes, and as FullyShardedDataParallel lays it out before it is cut.
            bound = each["held"] + each["states"] + 2 * block + OWN
            assert bound < 0.75 * model
            assert each["peak"] <= bound


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_cannot_be_is_refused_by_all_ranks_alike(case: int, found: Found) -> None:
    _, _, said = REFUSED[case]
    ranks = found("two", "refused")[case]
    for each in ranks:
        assert each["error"] == ranks[0]["error"]
        assert each["error"] is not None
        assert said in each["error"]
        assert each["reads"] == 0


def test_a_place_where_it_cannot_be_is_refused(found: Found) -> None:
    [ranks] = found("two", "refuses_places")
    for name, said in PLACES.items():
        for each in ranks if name != "group of others" else ranks[1:]:
            assert said in (each[name] or ""), name
    [[alone]] = found("alone", "without_group")
    assert "mesh_or_group: there is no process group; start the program by torchrun" in alone["error"]


def test_a_fault_of_one_rank_ends_all_with_its_error(found: Found) -> None:
    for (_, _, said), ranks in zip(FAILING, found("two", "fails"), strict=True):
        assert all(said in each["error"] for each in ranks)
        assert ranks[0]["again"] == ranks[1]["again"]  # and they can go on


def test_ranks_end_when_another_is_killed(found: Found) -> None:
    [[left]] = found("killed", "is_killed")
    assert left["error"] is not None


def test_the_programs_of_the_page_run(found: Found) -> None:
    [[first, other]] = found("program", "runs_programs")
    assert first["adapters"] == 21  # on each linear layer of the demo
    assert other["adapters"] is None
