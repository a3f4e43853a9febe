"""Each thing that is relied on inside DeepSpeed, by name: a failure here says what another version of DeepSpeed changed."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks
from torch import Tensor, nn
from training_toys import ROOT, make_recipe

from dpt.config.recipe import load_recipe
from dpt.training import deepspeed_internals as internals
from dpt.training.engine import Engine
from dpt.training.fragments import fragments, refresh_weights

FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ENGINES: dict[str, dict[str, Any]] = {  # what DeepSpeed makes of a recipe
    "zero0 fp32": {"zero_optimization.stage": 0},
    "zero0 bf16": {"zero_optimization.stage": 0, "bf16.enabled": True},
    "zero1 fp32": {"zero_optimization.stage": 1},
    "zero1 bf16": {"zero_optimization.stage": 1, "bf16.enabled": True, **FP32_SUMS},
    "zero2 fp16": {"zero_optimization.stage": 2, "fp16.enabled": True, "fp16.initial_scale_power": 4},
    "zero3 fp32": {"zero_optimization.stage": 3},
    "zero3 cut": {"zero_optimization.stage": 3, "zero_optimization.stage3_param_persistence_threshold": 0},
}
_STEP = ["overflow", "_global_grad_norm"]
ASSUMED = {  # class -> attributes
    "DeepSpeedEngine": ["enable_backward_allreduce", "micro_steps"],
    "FP16_UnfusedOptimizer": ["fp16_groups", "fp32_groups", *_STEP],
    "DeepSpeedZeroOptimizer": [
        "bit16_groups", "single_partition_of_fp32_groups", "update_lp_params", "loss_scaler", "reduce_gradients", *_STEP,
    ],
    "BF16_Optimizer": [
        "bf16_groups", "fp32_groups_flat_partition", "update_lp_params", "fp32_groups_gradients", "fp32_groups_gradients_flat",
        "fp32_groups_has_gradients", "has_moe_layers", "_update_hp_grad", "clear_hp_grads", "get_grads_for_norm",
        "get_grads_for_reduction", *_STEP,
    ],
    "DeepSpeedZeroOptimizer_Stage3": [
        "grad_position", "get_param_id", "_get_param_partition_rank", "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat", "_unflatten_partitioned_parameters", "persistent_parameters", "loss_scaler",
        "overlapping_partition_gradients_reduce_epilogue", *_STEP,
    ],
    "DynamicLossScaler": ["dynamic", "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"],
    "parameter of ZeRO 1 and 2": ["_hp_mapping"],
    "parameter of ZeRO 3": ["ds_shape", "ds_numel", "partition", "all_gather"],
    "tensor_fragment": ["lp_fragment_address", "hp_fragment_address"],
    "fragment_address": ["start", "numel"],
}  # fmt: skip


class _Net(nn.Module):
    """Two parameters, of which two ranks' equal parts end within one; its forward returns the loss first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x).float().square().mean(),)


class _Fork(nn.Module):
    """Two layers, of which every second forward pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x: Tensor, both: bool) -> tuple[Tensor]:
        return (sum(layer(x) for layer in self.layers[: 1 + both]).float().square().mean(),)


def _weights_and_norms(recipe_path: Path) -> list[tuple[Tensor, list[float]]]:
    """After four steps of two micro-batches: summed as DeepSpeed does, and directly."""
    results = []
    for directly in (False, True):
        fields = ENGINES["zero1 bf16"] | {"gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
        with pytest.MonkeyPatch.context() as patch:
            if not directly:
                fields = fields | {"bf16.immediate_grad_update": False}
                patch.setattr(internals, "sum_gradients_directly", lambda optimizer: None)
            engine = Engine(load_recipe(recipe_path, fields), _Fork())
        norms = []
        for both in ((True, True), (False, True), (False, False), (True, False)):
            torch.manual_seed(sum(both))
            for number, used in enumerate(both):
                engine.accumulate(torch.randn(4, 5).to(engine.dtype), used)
                if not number:
                    engine.end_micro_batch()
            norms.append(engine.step(1e-2).grad_norm)
        results.append((torch.cat([f.master().flatten() for f in fragments(engine.deepspeed)]).clone(), norms))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_summed_directly_are_deepspeeds(tmp_path, ranks):
    """Bit by bit, where a parameter has no gradient in some micro-batches or in none of a step's, too."""
    for result in run_ranks(ranks, _weights_and_norms, make_recipe(tmp_path / "run.json", []), as_launched=True):
        (weights, norms), (directly, direct_norms) = result
        assert torch.equal(weights, directly)
        assert direct_norms == pytest.approx(norms, rel=1e-6)


def _look(recipe_path: Path) -> dict[str, Any]:
    """On each rank: {"seen": {"CLASS.ATTRIBUTE", ...}, name of the engine: {"kind", "covered", "refreshed", ...}}."""
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    result: dict[str, Any] = {}
    seen: set[str] = set()
    for name, fields in ENGINES.items():
        engine = Engine(load_recipe(recipe_path, fields), _Net())
        engine.accumulate(torch.ones(4, 5, dtype=engine.dtype))
        step = engine.step(1e-3)
        seen |= _attributes(engine)
        result[name] = {"kind": type(engine.deepspeed.optimizer).__name__, "applied": step.applied, **_round_trip(engine)}
    return result | {"seen": sorted(seen)}


def _attributes(engine: Any) -> set[str]:
    inner, optimizer = engine.deepspeed, engine.deepspeed.optimizer
    parameters = list(engine.module.parameters())
    objects: dict[str, Any] = {type(one).__name__: one for one in (inner, optimizer, getattr(optimizer, "loss_scaler", None))}
    if hasattr(parameters[0], "ds_id"):
        objects["parameter of ZeRO 3"] = parameters[0]
    for parameter in parameters:
        if hasattr(parameter, "_hp_mapping"):
            objects["parameter of ZeRO 1 and 2"] = parameter
        if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            objects |= {type(one).__name__: one for one in (mapping, mapping.lp_fragment_address)}
    return {f"{kind}.{n}" for kind, names in ASSUMED.items() for n in names if kind in objects and hasattr(objects[kind], n)}


def _round_trip(engine: Any) -> dict[str, Any]:
    """Write numbers through the fragments, and read them where the network computes."""
    import deepspeed

    counts = {"layer.weight": torch.zeros(15), "layer.bias": torch.zeros(3)}
    for fragment in fragments(engine.deepspeed):
        positions = torch.arange(fragment.offset, fragment.offset + fragment.numel)
        with torch.no_grad():
            fragment.master().copy_(positions.float())
        counts[fragment.name][positions] += fragment.owned
    refresh_weights(engine.deepspeed)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = [p.detach().float().flatten().clone() for p in engine.module.parameters()]
    return {"covered": torch.cat(list(counts.values())), "weights": torch.cat(weights)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    recipe = make_recipe(tmp_path_factory.mktemp("internals") / "run.json", [])
    return run_ranks(2, _look, recipe, timeout_s=300.0, as_launched=True)


@pytest.mark.parametrize("name", [f"{kind}.{attribute}" for kind, names in ASSUMED.items() for attribute in names])
def test_deepspeed_still_has(ranks: list[dict[str, Any]], name: str) -> None:
    assert any(name in rank["seen"] for rank in ranks)


@pytest.mark.parametrize("name", ENGINES)
def test_fragments_cover_each_number_once_and_reach_the_network(ranks: list[dict[str, Any]], name: str) -> None:
    """Whatever the attributes are called: what is written to master weights is what the network then computes with."""
    assert all(rank[name]["applied"] for rank in ranks)
    assert (ranks[0][name]["covered"] + ranks[1][name]["covered"]).tolist() == [1] * 18
    for rank in ranks:
        assert rank[name]["weights"].tolist() == [*range(15), *range(3)]


def test_deepspeed_still_reads_our_layer_as_its_own() -> None:
    """What dpt/models/moe_parallel.py relies on."""
    import inspect

    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.ops import __compatible_ops__

    source = inspect.getsource(MoE)
    for name in ("use_residual", "enable_expert_tensor_parallelism", "expert_group_name", "num_local_experts", "ep_size"):
        assert f"self.{name}" in source, name
    assert "self.deepspeed_moe._set_ep_group(" in source
    parameter = nn.Parameter(torch.zeros(1))
    assert not is_moe_param(parameter)
    parameter.allreduce = False  # type: ignore[attr-defined]
    assert is_moe_param(parameter)
    assert "deepspeed_shm_comm" in __compatible_ops__


def test_the_installed_version_is_one_that_setup_allows() -> None:
    (bound,) = re.findall(r'"deepspeed>=0\.(\d+),<0\.(\d+)"', (ROOT / "setup.py").read_text())
    major, minor = importlib.metadata.version("deepspeed").split(".")[:2]
    assert major == "0"
    assert int(bound[0]) <= int(minor) < int(bound[1])


def test_no_other_file_of_training_reaches_inside() -> None:
    names = {name for kind, attributes in ASSUMED.items() for name in attributes if kind != "fragment_address"}
    names -= {"dynamic", "partition", "all_gather", "loss_scaler"}  # also words of public interfaces
    pattern = re.compile(rf"\.({'|'.join(sorted(names))})\b")
    for path in (ROOT / "dpt").rglob("*.py"):
        if path.name != "deepspeed_internals.py":
            found = pattern.findall(path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found}"
