"""Real runs, started by launchers: equal however they are spread, exact when continued, safe when numbers are not finite.

All in one file, so that one worker of pytest does the launches (see `training_runs.py`) for all tests.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import OBJECTIVES, POISONED, RESUMED, ROADS, SLOW, SPREAD, Runs
from training_toys import records

from dpt.config.recipe import load_recipe
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.models.pretrained import read_weights
from dpt.training.checkpoint import Pieces, check_file, find_checkpoints, read_state
from dpt.training.data_loader import open_data_loader
from dpt.training.export import checkpoint_weights, export
from dpt.training.step import LossModule, Preparation


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """All runs, without the slow ones if none of their tests is asked for."""
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    return Runs(tmp_path_factory.mktemp("training"), slow=slow)


def _marked(name: str, *values: object) -> object:
    """A parameter set, marked slow if the run `name` is."""
    return pytest.param(*values, marks=[pytest.mark.slow] if name in SLOW else [], id=name)


# --- spread over ranks --------------------------------------------------------------------------------------------------


def _reference(name: str) -> str:
    """The run on one rank that `name` must equal."""
    if "biases" in name:
        return "moe_biases_accumulated" if "accumulated" in name else "moe_biases"
    if name == "moe_accumulated" or name.removeprefix("dense_") in OBJECTIVES:
        return name
    return f"{name.split('_')[0]}_zero0"


@pytest.mark.parametrize(
    ("ranks", "name"), [_marked(f"{ranks}_{name}", ranks, name) for ranks, spread in SPREAD.items() for name in spread]
)
def test_losses_and_weights_are_those_of_one_rank(runs: Runs, ranks: int, name: str) -> None:
    run, reference = runs(f"{ranks}_{name}"), runs(f"1_{_reference(name)}")
    half = name.endswith("16")
    found, expected = records(run), records(reference)
    assert [record["step"] for record in found] == list(range(1, 21))
    quantities = ["loss", "grad_norm", "router_z_loss", "load_balancing_loss"]
    for key in (f"train/{quantity}" for quantity in quantities):
        if key in expected[0]:
            values, wanted = ([record[key] for record in lines] for lines in (found, expected))
            assert values == pytest.approx(wanted, rel=3e-2 if half else 2e-4, abs=1e-5), key
    weights, wanted_weights = (load_file(folder / "weights" / "weights.safetensors") for folder in (run, reference))
    assert weights.keys() == wanted_weights.keys()
    if half:
        difference, size = (
            torch.stack([tensor.norm() for tensor in tensors]).norm()
            for tensors in ([weights[key] - wanted_weights[key] for key in weights], list(wanted_weights.values()))
        )
        assert difference < 0.02 * size
        return
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted_weights[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_losses_weights_and_averages_are_those_of_a_plain_loop(runs: Runs, name: str) -> None:
    """torch's own AdamW and clipping, without DeepSpeed, and averages kept by hand."""
    run = runs(f"1_{name}_zero0")
    config = load_recipe(runs.recipe, SPREAD[1][f"{name}_zero0"]).dpt
    data_loader = open_data_loader(config, global_batch_size=8, micro_batch_size=8, start_sample=0, pin_memory=False)
    prepare = Preparation(
        config,
        tasks=data_loader.tasks,
        scaling_factor=data_loader.vae.scaling_factor,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    torch.manual_seed(config.training.seed)
    module = LossModule(DiT(config.model), config)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.01)
    averages = {decay: {n: p.detach().clone() for n, p in module.network.named_parameters()} for decay in (0.9, 0.5)}
    batches = iter(data_loader.stream)
    for number, expected in enumerate(records(run), 1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(number / 3, 1.0)
        optimizer.zero_grad()
        losses = module(*prepare(next(batches)))
        losses.total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        optimizer.step()
        assert (float(losses.loss), norm) == pytest.approx((expected["train/loss"], expected["train/grad_norm"]), rel=2e-4)
        for decay, average in averages.items():
            now = min(decay, (1 + number) / (10 + number)) if config.training.ema_warmup else decay
            for key, parameter in module.network.named_parameters():
                average[key].lerp_(parameter.detach(), 1 - now)
    batches.close()  # type: ignore[attr-defined]
    checkpoint = find_checkpoints(run / "checkpoints")[0]
    found = {decay: checkpoint_weights(checkpoint, ema=True, ema_decay=decay).state for decay in averages}
    found[0.0], averages[0.0] = checkpoint_weights(checkpoint, ema=False).state, dict(module.network.named_parameters())
    for decay, average in averages.items():
        for key, tensor in average.items():
            torch.testing.assert_close(found[decay][key], tensor.detach(), rtol=1e-3, atol=2e-4, msg=f"{decay} {key}")


def test_training_learns_and_averages_lag(runs: Runs) -> None:
    run = runs("1_dense_zero0")
    losses = [record["train/loss"] for record in records(run)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    weights = load_file(run / "weights" / "weights.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[name], weights[f"ema.{name}"])


def test_records_add_up(runs: Runs) -> None:
    found = records(runs("2_moe_zero1_ep2"))
    last = found[-1]
    assert last["train/samples_seen"] == 160
    assert last["compute/train_macs"] == pytest.approx(160 * 3 * last["compute/forward_macs"], rel=0.02)
    flops = 2 * last["compute/train_macs"] / 160 * last["perf/samples_per_second"]
    assert last["perf/matrix_peak_share"] == pytest.approx(flops / (2 * 1e12), rel=1e-6)
    assert 0 <= last["experts/min_load"] <= 1 <= last["experts/max_load"] <= 4 / 2
    assert 0 <= last["perf/data_wait"] <= 1
    assert last["perf/memory_gib"] > 0.1
    assert [record["train/learning_rate"] for record in found[:4]] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])


# --- stopped and continued ----------------------------------------------------------------------------------------------


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """All that the run's newest checkpoint holds, by file and name."""
    files = sorted(find_checkpoints(run / "checkpoints")[0].glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", [_marked(name, name) for name in RESUMED])
def test_on_the_same_layout_a_continued_run_is_the_same_bit_for_bit(runs: Runs, name: str) -> None:
    whole, parts = _tensors(runs(f"{name}_whole")), _tensors(runs(f"{name}_parts"))
    assert whole.keys() == parts.keys()
    for key in whole:
        assert torch.equal(whole[key], parts[key]), key
    states = [read_state(find_checkpoints(runs(f"{name}_{kind}") / "checkpoints")[0]) for kind in ("whole", "parts")]
    assert states[0]["engine"] == states[1]["engine"]
    assert states[0]["samples_seen"] == states[1]["samples_seen"] == 160
    for first, second in zip(*(records(runs(f"{name}_{kind}")) for kind in ("whole", "parts")), strict=True):
        for key in ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/samples_seen"):
            assert first[key] == second[key]


@pytest.mark.parametrize("name", ROADS)
def test_on_other_layouts_a_continued_run_stays_close(runs: Runs, name: str) -> None:
    straight, road = runs(f"straight_{name}"), runs(f"road_{name}")
    losses, wanted = ([record["train/loss"] for record in records(run)] for run in (road, straight))
    assert losses == pytest.approx(wanted, rel=2e-4)
    state = read_state(find_checkpoints(road / "checkpoints")[0])
    assert (state["step"], state["layout"]["world_size"], state["samples_seen"]) == (20, 2, 160)
    found, expected = (load_file(run / "weights" / "weights.safetensors") for run in (road, straight))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", ROADS)
def test_moments_and_averages_are_carried_over(runs: Runs, name: str) -> None:
    """After 20 steps on one rank, and on 1, 2, 4 and 2 with other stages."""
    checkpoints = [find_checkpoints(runs(f"{kind}_{name}") / "checkpoints")[0] for kind in ("road", "straight")]
    road, straight = (read_state(checkpoint) for checkpoint in checkpoints)
    assert road["states"] == straight["states"] == ["master", "exp_avg", "exp_avg_sq", "ema0", "ema1"]
    assert road["parameters"] == straight["parameters"]
    assert road["engine"]["updates"] == straight["engine"]["updates"] == 20
    for kind in road["states"]:
        found, expected = (
            torch.cat([pieces.whole(kind, key, shape).flatten() for key, shape in road["parameters"].items()])
            for pieces in (Pieces(checkpoints[0], road), Pieces(checkpoints[1], straight))
        )
        assert (found - expected).norm() < 1e-3 * expected.norm(), kind


@pytest.mark.parametrize("name", [_marked(f"poisoned_{name}", name) for name in POISONED])
def test_steps_that_are_not_finite_are_skipped_on_all_ranks(runs: Runs, name: str) -> None:
    found = records(runs(f"poisoned_{name}"))
    assert [record["step"] for record in found] == list(range(1, 21))
    assert [record["train/skipped_steps"] for record in found] == [0] * 4 + [1] + [2] * 15
    state = read_state(find_checkpoints(runs(f"poisoned_{name}") / "checkpoints")[0])
    assert (state["skipped"], state["engine"]["updates"]) == (2, 18)
    weights = load_file(runs(f"poisoned_{name}") / "weights" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_too_many_in_a_row_go_back_once_and_then_stop_with_a_report(runs: Runs) -> None:
    said = runs.report
    assert (
        "too many steps in a row up to step 9 were not finite (loss nan), also after going back to the last checkpoint" in said
    )
    report = json.loads((runs("failing") / "failure.json").read_text())
    assert (report["step"], report["loss"]) == (9, "nan")
    assert len(report["sample_keys"]) == 8
    assert len(report["largest_weight_norms"]) == 8
    assert all(norm > 0 for norm in report["largest_weight_norms"].values())
    assert find_checkpoints(runs("failing") / "checkpoints")[0].name.endswith("8")


def test_a_rewind_leaves_out_the_samples_that_led_to_it(runs: Runs) -> None:
    """Samples 45 to 66 are not finite: steps 6, 7 and 8, and step 5 of the course after the rewind to step 4."""
    found = records(runs("rewound_whole"))
    assert [record["step"] for record in found] == list(range(1, 21))
    assert [record["train/skipped_samples"] for record in found] == [0] * 4 + [32] * 16
    assert [record["train/skipped_steps"] for record in found] == [0] * 4 + [1] * 16
    assert [record["train/samples_seen"] for record in found] == [8 * step for step in range(1, 21)]
    state = read_state(find_checkpoints(runs("rewound_whole") / "checkpoints")[0])
    assert (state["step"], state["samples_seen"], state["skipped_samples"]) == (20, 160, [[32, 64]])
    assert (state["skipped_in_a_row"], state["engine"]["updates"]) == (0, 19)
    assert json.loads((runs("rewound_whole") / "tags.json").read_text()) == {"dpt.skipped_samples": "32 to 63"}


def test_a_rewound_run_that_was_interrupted_is_the_same_bit_for_bit(runs: Runs) -> None:
    whole, parts = _tensors(runs("rewound_whole")), _tensors(runs("rewound_parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    for first, second in zip(*(records(runs(f"rewound_{kind}")) for kind in ("whole", "parts")), strict=True):
        for key in ("step", "train/loss", "train/learning_rate", "train/samples_seen", "train/skipped_samples"):
            assert first[key] == second[key] or first[key] is second[key] is None


def test_a_damaged_last_checkpoint_is_made_anew(runs: Runs) -> None:
    checkpoint = find_checkpoints(runs("damaged") / "checkpoints")[0]
    assert checkpoint.name.endswith("20")
    for name, entry in read_state(checkpoint)["files"].items():
        check_file(checkpoint / name, entry)
    whole, again = _tensors(runs("2_dense_zero1")), _tensors(runs("damaged"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_averages_are_taken_up_by_their_decay(runs: Runs) -> None:
    """After 7 steps with averages of decays 0.9 and 0.5, the rest with 0.5 and 0.7."""
    kept, changed = (find_checkpoints(runs(name) / "checkpoints")[0] for name in ("2_dense_zero1", "averages"))
    found, expected = (checkpoint_weights(one, ema=True, ema_decay=0.5).state for one in (changed, kept))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain, new = checkpoint_weights(changed, ema=False).state, checkpoint_weights(changed, ema=True, ema_decay=0.7).state
    distances = [
        float(torch.stack([(average[name] - plain[name]).norm() for name in plain]).norm()) for average in (found, new)
    ]
    assert 0 < distances[0] < distances[1]


def test_any_checkpoint_exports_and_is_a_start(runs: Runs, tmp_path: Path) -> None:
    run = runs("road_moe")
    out = export(run, tmp_path / "weights")
    exported, kept = (load_file(folder / "weights.safetensors") for folder in (out, run / "weights"))
    assert exported.keys() == kept.keys()
    assert all(torch.equal(exported[key], kept[key]) for key in kept)
    config = json.loads((out / "config.json").read_text())
    assert config["lineage"]["step"] == 20
    assert config["lineage"]["samples_seen"] == 160
    assert config["lineage"]["train_macs"] > 0
    assert config["vae"]["sha256"] == "0" * 64
    averaged, plain = read_weights(out), checkpoint_weights(find_checkpoints(run / "checkpoints")[0], ema=True)
    assert averaged.averaged
    assert all(torch.equal(averaged.state[key], plain.state[key]) for key in plain.state)
    averaged.build()
    second = read_weights(export(run, tmp_path / "second", ema_decay=0.5))
    assert any(not torch.equal(second.state[key], averaged.state[key]) for key in second.state)
    with pytest.raises(UserError, match=r"decays \[0.9, 0.5\], none of 0.7"):
        export(run, tmp_path / "third", ema_decay=0.7)


# --- one stage after the other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["depth", "flow", "generalist"])
def test_fine_tuning_starts_from_pretrained_weights(runs: Runs, task: str) -> None:
    weights = read_weights(runs(f"finetune_{task}") / "weights")
    assert weights.sections["task"] == task
    assert weights.config.num_conditions == (1 if task == "depth" else 2)
    before = read_weights(runs("straight_dense") / "weights").state
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"):  # random at first, so others would be far from these
        assert (weights.state[name] - before[name]).abs().max() < 0.05 < before[name].abs().max()


def test_an_upcycled_network_begins_as_the_dense_one(runs: Runs) -> None:
    dense, upcycled = records(runs("finetune_again")), records(runs("upcycle"))
    assert upcycled[0]["train/loss"] == pytest.approx(dense[0]["train/loss"], rel=1e-5)
    assert upcycled[0]["train/load_balancing_loss"] >= 2 * 0.99  # of two layers, at least 1 each
    weights = read_weights(runs("upcycle") / "weights")
    assert (weights.config.num_experts, weights.config.expert_activation) == (4, "gelu")


def test_no_steps_export_the_start(runs: Runs) -> None:
    folder = runs("untrained") / "weights"
    averaged, plain = read_weights(folder), read_weights(folder, ema=False)
    assert all(torch.equal(tensor, plain.state[name]) for name, tensor in averaged.state.items())
    assert json.loads((folder / "config.json").read_text())["lineage"]["train_macs"] == 0
