"""Recipes: layers, types, refusals."""

import json
from pathlib import Path

import pytest

from dpt.config.checks import check_recipe
from dpt.config.command import parse_command
from dpt.config.presets import PRESETS
from dpt.config.recipe import load_recipe, section_from_dict
from dpt.config.sections import ModelConfig
from dpt.errors import UserError


def write(folder: Path, content: object) -> Path:
    path = folder / "recipe.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_later_layers_win(tmp_path: Path) -> None:
    given = {"model": {"preset": "a2", "depth": 3}, "training": {"steps": 5}}
    path = write(tmp_path, {"train_batch_size": 8, "dpt": given})
    overrides = {"training.steps": "7", "zero_optimization.stage": "2", "evaluation.steps": "1,5", "model.preset": "a1"}
    recipe = load_recipe(path, overrides)
    assert (recipe.dpt.model.hidden_size, recipe.dpt.model.depth) == (256, 3)  # the overriding preset's width, the file's depth
    assert recipe.dpt.training.steps == 7
    assert recipe.dpt.evaluation.steps == [1, 5]
    assert recipe.zero_stage == 2
    assert recipe.deepspeed["train_batch_size"] == 8


def test_text_stays_text(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"tracking.run_name": "007", "data.shards": "a,b", "tracking.tags": '{"k": "v"}'})
    assert recipe.dpt.tracking.run_name == "007"
    assert recipe.dpt.data.shards == ["a", "b"]
    assert recipe.dpt.tracking.tags == {"k": "v"}


def test_a_resolved_recipe_loads_again(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"model.preset": "S/2-8E2A", "train_batch_size": "4"})
    again = load_recipe(write(tmp_path, recipe.to_dict()))
    assert again.dpt == recipe.dpt
    assert again.deepspeed == recipe.deepspeed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"dpt": ', ["recipe.json", "line 1"]),
        ("[1]", ["recipe.json", "list"]),
        ({"trian_batch_size": 8}, ["trian_batch_size", "did you mean", "train_batch_size"]),
        ({"dpt": {"modle": {}}}, ["dpt.modle", "did you mean", "model"]),
        ({"dpt": {"training": {"stesp": 1}}}, ["dpt.training.stesp", '"steps"']),
        ({"dpt": {"training": {"steps": "many"}}}, ["dpt.training.steps", "many", "whole number"]),
        ({"dpt": {"training": {"steps": None}}}, ["dpt.training.steps is None; it must be a whole number"]),
        ({"dpt": {"model": {"num_classes": None}}}, ["dpt.model.num_classes is None; it must be a whole number"]),
        ({"dpt": {"training": {"steps": -1}}}, ["dpt.training.steps is -1; it must be at least 0"]),
        ({"dpt": {"training": 3}}, ["dpt.training", "object"]),
        ({"dpt": {"model": {"preset": "Q/9"}}}, ["Q/9", "S/2"]),
        ({"dpt": {"model": {"num_heads": 5}}}, ["num_heads", "5", "384"]),
        ({"dpt": {"model": {"num_experts": 2, "top_k": 3}}}, ["top_k", "num_experts"]),
        ({"dpt": {"task": "sleep"}}, ["dpt.task", "sleep"]),
    ],
)
def test_refusals_name_file_and_field(tmp_path: Path, content: object, words: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    assert "recipe.json" in message or "dpt.model.preset" in message
    for word in words:
        assert word in message
    assert "\n" not in message


def test_command_line_accepts_bare_fields_of_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, {"dpt": {}})
    arguments = ["--ds_config", str(path), "--steps", "1,5", "--ensemble=1", "--local_rank=0", "--training.steps", "3"]
    recipe = parse_command("evaluate", "", "evaluation", arguments)
    assert recipe.dpt.evaluation.steps == [1, 5]
    assert recipe.dpt.evaluation.ensemble == [1]
    assert recipe.dpt.training.steps == 3


@pytest.mark.parametrize("arguments", [["--stesp", "1"], ["--steps"], ["steps"], ["--training.stesp", "2"]])
def test_command_line_refuses(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"steps|stesp"):
        parse_command("pretrain", "", "training", arguments)


def test_a_second_value_is_told_how_lists_are_written() -> None:
    with pytest.raises(UserError, match=r'unexpected argument "b"; fields are set as .*, lists with commas'):
        parse_command("evaluate", "", "evaluation", ["--data", "a", "b"])


@pytest.mark.parametrize(
    ("keys", "world_size", "word"),
    [
        ({"train_batch_size": 6}, 4, "train_batch_size"),
        ({"train_batch_size": 0}, 1, "train_batch_size"),
        ({}, 1, "train_batch_size"),
        ({"train_batch_size": 4, "training.ep_size": 2}, 2, "dense"),
        ({"train_batch_size": 6, "training.ep_size": 2, "model.preset": "S/2-8E2A"}, 3, "ranks"),
        ({"train_batch_size": 3, "training.ep_size": 3, "model.preset": "S/2-8E2A"}, 3, "num_experts"),
        ({"train_batch_size": 3, "bf16.enabled": True, "model.hidden_size": 36, "model.num_experts": 4}, 3, "multiples of 8"),
        ({"train_batch_size": 4, "use_data_before_expert_parallelism": True}, 2, "consecutive ranks.* remove it"),
        ({"train_batch_size": 4, "model.router_gate": "sigmoid"}, 1, 'router_gate is "sigmoid", but the model is dense; set'),
        ({"train_batch_size": 4, "model.shared_expert_width": 64}, 1, "shared_expert_width is 64, but the model is dense; set"),
        ({"train_batch_size": 4, "diffusion.timestep_scale": 2.0}, 1, 'does nothing without dpt.diffusion.timesteps "logit_no'),
        ({"train_batch_size": 4, "training.ema_snapshot_every": 5}, 1, "does nothing without dpt.training.ema_lengths; set"),
        ({"train_batch_size": 4, "training.bypass_first": 1}, 1, "does nothing without dpt.training.bypass_share; set"),
        ({"train_batch_size": 4, "training.bypass_share": 0.5, "model.mlp_kernel_size": 3}, 1, "the whole grid of tokens"),
        ({"train_batch_size": 4, "model.mlp_kernel_size": 2}, 1, "choose 3 or 5"),
        ({"train_batch_size": 4, "model.mlp_kernel_size": 3, "model.num_experts": 4}, 1, "not their neighbours"),
        ({"train_batch_size": 4, "training.bypass_last": 1}, 1, "does nothing without dpt.training.bypass_share; set"),
        ({"train_batch_size": 4, "model.base_head_size": 32}, 1, "does nothing without dpt.model.base_width; set"),
        ({"train_batch_size": 4, "model.router_bias_balancing": True}, 1, "bias_balancing is true, but the model is dense"),
        ({"train_batch_size": 4, "training.expert_distance_every": 5}, 1, "expert_distance_every is 5, but the model is dense"),
        ({"train_batch_size": 4, "model.preset": "S/2-E16", "training.router_z_loss_weight": 0.1}, 1, "z_loss_weight is 0.1"),
        (
            {"train_batch_size": 4, "model.num_experts": 1, "model.top_k": 1, "training.expert_distance_every": 5},
            1,
            "one expert only; set it to 0",
        ),
        ({"train_batch_size": 4, "task": "depth"}, 1, "num_conditions"),
        ({"train_batch_size": 4, "bf16.enabled": True, "fp16.enabled": True}, 1, "bf16"),
        ({"train_batch_size": 4, "optimizer.type": "Lion"}, 1, "Lion"),
        ({"train_batch_size": 4, "model.num_classes": 4, "sampling.labels": [0, 4]}, 1, "labels has 4; .*labels are 0 to 3"),
    ],
)
def test_impossible_combinations(keys: dict[str, object], world_size: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_recipe(load_recipe(None, keys), world_size)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_model(preset: str) -> None:
    model = load_recipe(None, {"model.preset": preset}).dpt.model
    assert model.preset == preset
    assert section_from_dict(ModelConfig, {"hidden_size": model.hidden_size, "num_heads": model.num_heads}, "config.json")
