import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dpt import target_codes, tasks
from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation.loading import float32_products
from dpt.evaluation.prediction import Predictor
from dpt.models.costs import macs
from dpt.models.dit import DiTOutput
from tests.evaluation.tiny import PoolingCodec, make_model


def dense_output(prediction):
    zero, none = torch.zeros(()), torch.zeros(0, 0)
    return DiTOutput(prediction, zero, zero, none, none, none, zero)


class Copying(nn.Module):
    """A network that predicts the clean latents to be one of the condition images, and remembers what it was asked."""

    def __init__(self, condition: int = 0) -> None:
        super().__init__()
        self.condition, self.calls = condition, []

    def forward(self, inputs, timesteps, labels, embeddings=None, task_labels=None):
        self.calls.append((inputs, timesteps, labels, embeddings, task_labels))
        copied = inputs[:, 4 * self.condition : 4 * self.condition + 4]
        return dense_output(torch.cat((copied, copied), 1))


def _copying(task: str, *, condition: int = 0, num_conditions: int = 2, **config) -> Predictor:
    model = dataclasses.replace(make_model(task, num_conditions=num_conditions), network=Copying(condition))
    return Predictor(model, config=EvaluationConfig(steps=[2], **config), device="cpu")


def _image(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return tasks.resize_image(coarse, (height, width))


def _conditions(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("task", ["depth", "flow"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpmsolver++", 0.0)])
def test_latents_do_not_depend_on_batches_members_or_company(task, sampler, eta):
    model, keys = make_model(task), ["a", "b", "c"]
    predict = {
        size: Predictor(model, config=EvaluationConfig(batch_size=size, sampler=sampler, eta=eta), device="cpu").predict_latents
        for size in (1, 5, 64)
    }
    whole = predict[64](_conditions(3), keys, range(3), task=task, steps=4)
    assert whole.shape == (3, 3, 2 if task == "flow" else 1, 4, 4, 6)
    for size in (1, 5):
        assert torch.allclose(predict[size](_conditions(3), keys, range(3), task=task, steps=4), whole, atol=1e-5)
    alone = predict[64](_conditions(3)[1:2], ["b"], [2], task=task, steps=4)
    assert torch.allclose(alone[0, 0], whole[1, 2], atol=1e-5)
    assert (whole[0, 0] - whole[0, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(("precision", "products", "convolutions"), [("tf32", "high", True), ("fp32", "highest", False)])
def test_tf32_is_of_gpus_and_of_the_network_alone(precision, products, convolutions):
    def flags():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = flags()
    with float32_products(precision, torch.device("cpu")):
        assert flags() == before
    with float32_products(precision, torch.device("cuda")):
        assert flags() == (products, convolutions)
    assert flags() == before


def test_on_a_cpu_tf32_is_fp32():
    fp32, tf32 = (
        Predictor(make_model(), config=EvaluationConfig(precision=precision), device="cpu").predict_latents(
            _conditions(2), ["a", "b"], [0], task="depth", steps=3
        )
        for precision in ("fp32", "tf32")
    )
    assert torch.equal(fp32, tf32)


def test_seeds_change_and_targets_share_the_noise():
    class Noisy(Copying):
        def forward(self, inputs, *args):
            super().forward(inputs, *args)
            return dense_output(inputs[:, -4:])

    model = dataclasses.replace(make_model("flow"), network=Noisy())
    first, second = (
        Predictor(model, config=EvaluationConfig(seed=s), device="cpu").predict_latents(
            _conditions(1), ["k"], [0], task="flow", steps=3
        )
        for s in (0, 1)
    )
    assert torch.equal(first[0, 0, 0], first[0, 0, 1])
    assert not torch.allclose(first, second)


def test_images_of_any_size_come_back_at_their_own():
    predictor = _copying("depth")
    images = [_image(75, 100), _image(33, 47, 1), _image(200, 61, 2), _image(33, 47, 3)]
    results = predictor(images, ensemble=2, resolution=128)
    for image, result in zip(images, results, strict=True):
        assert result.value.shape == result.uncertainty.shape == image.shape[:2]
        assert result.value.min() >= 0
        assert result.value.max() <= 1
        assert result.uncertainty.max() < 1e-5  # members agree: the network ignores the noise
        grey = image.astype(float).mean(-1)
        assert np.corrcoef(result.value.ravel(), grey.ravel())[0, 1] > 0.9
    shapes = {call[0].shape[-2:] for call in predictor.network.calls}
    assert shapes == {(12, 16), (16, 4)}  # 128 px at the longest side, multiples of 16
    predictor([_image(33, 47)])
    assert predictor.network.calls[-1][0].shape[-2:] == (2, 4)  # the model's own 32 px


def test_depth_prompt_is_all_valid_and_labels_are_the_tasks():
    predictor = _copying("generalist", condition=1)
    (result,) = predictor([_image(32, 32)], task="depth")
    assert np.allclose(result.value, result.value[0, 0])  # the copied prompt is one colour
    inputs, _, labels, _, task_labels = predictor.network.calls[0]
    assert inputs.shape[1] == 12
    assert labels.tolist() == task_labels.tolist() == [10]


def test_flow_in_pixels_of_the_original_image():
    predictor = _copying("flow", condition=0)
    zero_motion = np.full((40, 80, 3), 127.5).astype(np.uint8)  # flow code about 0
    (result,) = predictor([zero_motion], others=[_image(40, 80)])
    assert result.value.shape == (2, 40, 80)
    code = 127 / 127.5 - 1
    for axis, extent in ((0, 80), (1, 40)):
        expected = target_codes.decode_flow(np.full((3, 1, 1), code), axis, extent)
        assert np.allclose(result.value[axis], expected, atol=1e-3)
    with pytest.raises(UserError, match="second frame"):
        predictor([zero_motion])


def test_amodal_masks_are_thresholded_at_full_size():
    predictor = _copying("amodal")
    image = np.full((64, 64, 3), 255, np.uint8)
    image[16:48, :32] = 60
    (result,) = predictor([image], others=[image[..., 0] < 200], ensemble=3, resolution=128)
    assert result.value.dtype == bool
    truth = image[..., 0] < 200
    assert (result.value & truth).sum() / (result.value | truth).sum() > 0.6
    assert result.whole.shape == image.shape
    assert (result.whole[~result.value] == 255).all()
    assert abs(float(result.whole[20:44, 4:24].mean()) - 60) < 15  # the object's own grey, as the picture shows it


def test_embeddings_reach_the_network_with_their_images():
    predictor = _copying("amodal", batch_size=2)
    images = [_image(32, 32), _image(16, 32), _image(32, 32)]
    masks = [np.ones(i.shape[:2], bool) for i in images]
    predictor(images, others=masks, embeddings=torch.arange(3.0)[:, None])
    assert [call[3].flatten().tolist() for call in predictor.network.calls[::2]] == [[0.0, 2.0], [1.0]]


def test_guidance_asks_for_the_null_label_too():
    predictor = _copying("generalist", guidance_scale=2.0)
    predictor([_image(32, 32)], task="depth")
    inputs, timesteps, labels, _, task_labels = predictor.network.calls[0]
    assert labels.tolist() == [10, 14]
    assert task_labels.tolist() == [10, 10]
    assert len(inputs) == len(timesteps) == 2
    guided, plain = (p.prediction_macs("depth", 4, 4, steps=3, ensemble=5) for p in (predictor, _copying("generalist")))
    assert guided == 2 * plain == 30 * macs(predictor.model).forward
    assert predictor.prediction_macs("flow", 4, 4, steps=3, ensemble=5) == 2 * guided


def test_a_narrow_model_takes_the_first_condition_only():
    predictor = _copying("flow", num_conditions=1)
    predictor([_image(32, 32)])
    assert predictor.network.calls[0][0].shape[1] == 8


def test_wrong_tasks_are_refused():
    with pytest.raises(UserError, match="cannot predict"):
        _copying("depth")([_image(32, 32)], task="flow", others=[_image(32, 32)])
    with pytest.raises(UserError, match="name one"):
        _copying("generalist")([_image(32, 32)])
    with pytest.raises(UserError, match="only class-conditional"):
        _copying("depth").generate([1], ["a"], steps=2)


def test_class_images():
    model = make_model("class", num_conditions=0)
    config = EvaluationConfig(guidance_scale=1.5, batch_size=2)
    images = Predictor(model, config=config, device="cpu").generate([1, 2, 3], ["a", "b", "c"], steps=3)
    assert [i.shape for i in images] == [(32, 32, 3)] * 3
    again = Predictor(model, config=config, device="cpu").generate([2], ["b"], steps=3, guidance_channels=4)
    assert np.abs(again[0].astype(int) - images[1]).max() <= 1


def test_schedule_of_the_config_replaces_that_of_training():
    assert Predictor(make_model(), device="cpu").diffusion.beta_schedule == "linear"
    config = EvaluationConfig(schedule="squaredcos_cap_v2", precision="bf16")
    predictor = Predictor(make_model(), config=config, device="cpu")
    assert predictor.diffusion.beta_schedule == "squaredcos_cap_v2"
    assert predictor([_image(32, 32)], steps=1, ensemble=1)[0].value.dtype == np.float32
    assert PoolingCodec.sha256 == predictor.codec.sha256


def test_sampling_follows_the_weights_spacing_and_time():
    model = make_model("depth", prediction_type="rectified_flow")
    diffusion = dataclasses.replace(model.diffusion, time_convention="fraction", timestep_spacing="linspace")
    predictor = Predictor(dataclasses.replace(model, diffusion=diffusion), device="cpu")
    seen = []
    predictor.network.t_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].item()))
    predictor([np.zeros((32, 32, 3), np.uint8)], steps=3)
    assert seen == pytest.approx([1.0, 0.5005, 0.001])
    config = EvaluationConfig(timestep_spacing="trailing")
    other = Predictor(dataclasses.replace(model, diffusion=diffusion), config=config, device="cpu")
    assert other.diffusion.timestep_spacing == "trailing"


def test_steps_outside_the_guidance_interval_cost_one_pass():
    def passes(**fields):
        predictor = Predictor(make_model("depth"), config=EvaluationConfig(**fields), device="cpu")
        seen = []
        predictor.network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        predictor.predict_latents(torch.zeros(1, 2, 4, 4, 4), ["a"], [0], task="depth", steps=10)
        alone = Predictor(make_model("depth"), config=EvaluationConfig(), device="cpu")
        one = alone.prediction_macs("depth", 4, 4, steps=1, ensemble=1)
        assert predictor.prediction_macs("depth", 4, 4, steps=10, ensemble=1) == sum(seen) * one
        return sum(seen)

    assert passes() == 10
    assert passes(guidance_scale=2.0) == 20
    assert 10 < passes(guidance_scale=2.0, guidance_low=0.2, guidance_high=0.6) < 20
