"""Every recipe in ds_configs/ loads, is possible on the hardware that it names, and is of the paper's sizes and settings."""

import re
from pathlib import Path

import pytest

from dpt.config.checks import batch_split, check_recipe, trained_model
from dpt.config.presets import preset_values
from dpt.config.recipe import Recipe, load_recipe
from dpt.models.costs import num_params
from dpt.training.preflight import needs

RECIPES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
SMALL = [path for path in RECIPES if path.stem.startswith(("cpu_", "quickstart", "real_"))]
"""For a CPU, with sizes of their own."""

PRETRAINING = [
    *(f"dense_{size}" for size in ("a1", "a2", "a3", "a4", "a5", "a6", "xl2_256", "xl2_512")),
    *("moe_s2_8e", "moe_s2_16e", "moe_l2", "moe_l2_512"),
]
FINE_TUNING = {  # steps, batch, first and last learning rate, side of the pictures
    **{f"finetune_depth_a{n}": (30_000, 256, 3e-5, 3e-7, 256) for n in range(1, 7)},
    "finetune_depth_xl2_256": (30_000, 256, 3e-5, 3e-7, 256),
    "finetune_depth_xl2_512": (30_000, 256, 3e-5, 3e-7, 512),
    "finetune_depth_moe_l2": (30_000, 256, 3e-5, 3e-7, 256),
    "finetune_depth_moe_l2_512": (30_000, 256, 3e-5, 3e-7, 512),
    "finetune_depth": (30_000, 1024, 1.2e-4, 1.2e-6, 512),
    "finetune_flow": (40_000, 1024, 1.2e-4, 1.2e-6, 512),
    "finetune_amodal": (6_000, 4096, 1.2e-4, 1.2e-6, 256),
    "finetune_generalist": (40_000, 1024, 1.2e-4, 1.2e-6, 512),
    **{f"upcycle_depth_a{n}": (15_000, 256, 3e-5, 3e-7, 256) for n in (2, 3, 4)},
    "upcycle_depth_xl2": (15_000, 1024, 3e-5, 3e-7, 512),
    "upcycle_generalist": (4_000, 1024, 1.2e-4, 1.2e-6, 512),
}
BEST = {"best_depth_a4": "finetune_depth_a4", "best_depth_xl2_512": "finetune_depth_xl2_512"}
"""Recipes with what beat the paper's way, and the paper's recipe that each stands beside."""
PUBLISHED = {  # millions of parameters: all, active (the paper's Tables 1 and 2; DiT's; those of the upcycled forms)
    "a1": (14.8, 14.8),
    "a2": (77.2, 77.2),
    "a3": (215.5, 215.5),
    "a4": (458.1, 458.1),
    "a5": (1199, 1199),
    "a6": (1863, 1863),
    "XL/2": (675, 675),
    "S/2-8E2A": (199.3, 71.9),
    "S/2-16E2A": (369.2, 71.9),
    "L/2-8E2A": (2824, 1012),
    "a2 upcycled": (312, 111),
    "a3 upcycled": (877, 310),
    "a4 upcycled": (1868, 660),
    "XL/2 upcycled": (2758, 974),
}


def stage_of(path: Path) -> str:
    """The stage that a shipped recipe is for, by its name."""
    first = path.stem.split("_")[0]
    if path.stem.endswith("upcycle"):
        return "upcycle"
    return {"finetune": "finetune", "upcycle": "upcycle", "best": "finetune"}.get(first, "pretrain")


def _load(name: str) -> Recipe:
    return load_recipe(next(path for path in RECIPES if path.stem == name))


def _ranks(recipe: Recipe) -> int:
    found = re.match(r"(?:CPU, )?(\d+) (?:GPUs?|process(?:es)?)\b", recipe.dpt.hardware)
    assert found, "hardware must begin with the number of GPUs or processes"
    return int(found[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_possible_on_its_hardware(path: Path) -> None:
    """Prints the memory plan (pytest -s, or -rP); a launcher prints it too."""
    recipe = load_recipe(path)
    ranks = _ranks(recipe)
    check_recipe(recipe, ranks, stage=stage_of(path))
    total, micro, accumulation = batch_split(recipe, ranks)
    assert total == micro * accumulation * ranks
    assert recipe.dpt.data.shards
    assert recipe.dpt.tracking.run_name
    required = needs(recipe, stage_of(path), ranks)
    print(f"{path.stem} ({recipe.dpt.hardware}). {required.plan}")
    size = re.search(r"(\d+) GB", recipe.dpt.hardware)
    assert size, "hardware must say how many GB each GPU or process has"
    assert required.bytes_per_rank < 0.95 * int(size[1]) * 1e9


def test_gpus_evaluate_in_tf32_and_cpus_in_fp32() -> None:
    for path in RECIPES:
        recipe = load_recipe(path).dpt
        if recipe.task != "class":
            assert recipe.evaluation.precision == ("fp32" if "CPU" in recipe.hardware else "tf32"), path.stem


def test_every_run_of_the_paper_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} == {*PRETRAINING, *FINE_TUNING, *BEST, *(path.stem for path in SMALL)}


@pytest.mark.parametrize("name", BEST)
def test_the_best_recipe_is_the_papers_in_one_step_for_half_as_long(name: str) -> None:
    best, paper = _load(name).dpt, _load(BEST[name]).dpt
    assert (best.model, best.data, best.task, best.hardware) == (paper.model, paper.data, paper.task, paper.hardware)
    assert best.training.steps * 2 == paper.training.steps
    assert (best.diffusion.timesteps, best.diffusion.initial_noise, best.diffusion.vlb_weight) == ("last", "zero", 0.0)
    assert (best.evaluation.steps, best.evaluation.ensemble) == ([1], [1])


@pytest.mark.parametrize("name", [*PRETRAINING, *FINE_TUNING])
def test_networks_are_the_presets(name: str) -> None:
    recipe = _load(name)
    model = recipe.dpt.model
    for field, value in preset_values(model.preset).items():
        assert getattr(model, field) == value, field
    upcycled = name.startswith("upcycle")
    count = num_params(trained_model(recipe, "upcycle" if upcycled else "pretrain"))
    published = PUBLISHED[model.preset + " upcycled" * upcycled]
    assert (count.total / 1e6, count.active / 1e6) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", PRETRAINING)
def test_pre_training_is_that_of_dit(name: str) -> None:
    """Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 4; Fei et al., "DiT-MoE", 2024."""
    recipe = _load(name)
    config = recipe.dpt
    assert recipe.deepspeed["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0},
    }
    assert (recipe.deepspeed["train_batch_size"], config.training.steps) == (256, 400_000)
    assert (config.training.lr_schedule, config.training.warmup_steps) == ("constant", 0)
    assert config.training.ema_decays[0] == 0.9999
    assert (config.data.horizontal_flip, config.data.posterior) == (True, "sample")
    diffusion = config.diffusion
    assert (diffusion.num_train_timesteps, diffusion.beta_schedule) == (1000, "linear")
    assert (diffusion.beta_start, diffusion.beta_end, diffusion.prediction_type) == (1e-4, 0.02, "epsilon")
    assert (diffusion.vlb_weight, diffusion.min_snr_gamma, diffusion.multires_noise_strength) == (1.0, 0.0, 0.0)
    model = config.model
    assert (model.num_classes, model.class_dropout_prob, model.learn_sigma) == (1000, 0.1, True)
    assert (config.training.balance_loss_weight, config.training.router_z_loss_weight) == (0.01, 0.0)
    assert model.input_size == (64 if name.endswith("512") else 32)
    assert config.sampling.every > 0


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_is_that_of_the_paper(name: str) -> None:
    """Sections 4 and 6."""
    recipe = _load(name)
    config = recipe.dpt
    steps, batch, first, last, side = FINE_TUNING[name]
    assert (config.training.steps, recipe.deepspeed["train_batch_size"]) == (steps, batch)
    assert recipe.deepspeed["optimizer"]["params"]["lr"] == first
    assert (config.training.lr_schedule, config.training.lr_final) == ("exponential", last)
    assert config.model.input_size == side // 8
    assert all(f"_{side}/" in shards for shards in config.data.shards)
    assert config.data.posterior == "mean"
    assert config.training.weights
    if name.startswith("upcycle"):
        assert (config.upcycling.num_experts, config.upcycling.top_k, config.upcycling.normalize_top_k) == (8, 2, True)


@pytest.mark.parametrize(
    "name", ["finetune_depth", "finetune_flow", "finetune_amodal", "finetune_generalist", "upcycle_generalist"]
)
def test_final_models_follow_the_released_configuration(name: str) -> None:
    """Where the paper is silent: cosine betas in training and at test, annealed multi-resolution noise, flow merged by mean."""
    config = _load(name).dpt
    assert config.diffusion.beta_schedule == config.evaluation.schedule == "squaredcos_cap_v2"
    assert (config.diffusion.multires_noise_strength, config.diffusion.multires_noise_annealed) == (0.9, True)
    assert config.evaluation.aggregation == ("mean" if config.task == "flow" else "compile")
