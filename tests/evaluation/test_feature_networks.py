import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from dpt.errors import UserError
from dpt.evaluation.feature_networks import load_dinov2, load_features, resize_as_tensorflow
from tests.evaluation.image_networks import Random, TinyInception, random_images, save_network


def _tensor(count: int, side: int) -> torch.Tensor:
    return torch.from_numpy(random_images(count, 0, side=side)).permute(0, 3, 1, 2).contiguous()


def test_tensorflows_resize_by_its_definition():
    image = torch.tensor([[[[0.0, 10.0], [20.0, 40.0]]]])
    # Pixel i of 4 lies at i / 2: on 0, halfway, on 1, and past the end, where the last one stays.
    row = torch.tensor([0.0, 5.0, 10.0, 10.0])
    torch.testing.assert_close(resize_as_tensorflow(image, 4)[0, 0, 0], row)
    torch.testing.assert_close(resize_as_tensorflow(image, 4)[0, 0, 1], (row + torch.tensor([20.0, 30.0, 40.0, 40.0])) / 2)


def test_inception_in_one_pass_gives_all_that_it_gives_in_several(tmp_path):
    module = TinyInception()
    network = load_features(*save_network(module, tmp_path / "tiny.pt"))
    images = _tensor(3, 40)
    found = network(images)
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, module(images, return_features=True), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.probabilities, module(images, no_output_bias=True), rtol=1e-4, atol=1e-5)
        hidden = module.layers.mixed_6.conv(module.layers.conv((resize_as_tensorflow(images.float(), 299) - 128) / 128))
    assert hidden.shape[1] == 9
    expected = hidden[:, :7].permute(0, 2, 3, 1).reshape(3, -1)  # channels last, as TensorFlow and so ADM's files have them
    torch.testing.assert_close(found.spatial, expected)


def test_layers_that_are_not_the_network_are_refused(tmp_path):
    with pytest.raises(UserError, match="do not compute its features"):
        load_features(*save_network(TinyInception(shift=0.0), tmp_path / "other.pt"))


def test_only_files_of_the_known_hash_are_read(tmp_path, monkeypatch):
    path, sha256 = save_network(Random(), tmp_path / "own.pt")
    with pytest.raises(UserError, match=f"its sha256 is {sha256}, not f58cb9b6"):
        load_features(path)
    assert load_features(path, sha256.upper())(_tensor(2, 6)).pooled.shape == (2, 6)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"hub/checkpoints/inception-2015-12-05\.pt'; fetch"):
        load_features()
    pickled = tmp_path / "pickle.pt"
    torch.save(Random(), pickled)
    with pytest.raises(UserError, match="no TorchScript file"):
        load_features(pickled, hashlib.sha256(pickled.read_bytes()).hexdigest())


def test_dinov2_is_the_normed_class_token_of_resized_pictures(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "dino")
    sha256 = hashlib.sha256((tmp_path / "dino" / "model.safetensors").read_bytes()).hexdigest()
    images = random_images(2, 0, side=30)
    found = load_dinov2(str(tmp_path / "dino"), sha256)(torch.from_numpy(images).permute(0, 3, 1, 2))
    resized = [np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC)) for i in images]
    values = (np.stack(resized) / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        expected = model(torch.from_numpy(values.transpose(0, 3, 1, 2)).float()).pooler_output
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-5)
    assert found.spatial is None
    for name, words in (
        (str(tmp_path / "dino"), "its sha256 is"),
        (str(tmp_path / "none"), "no such folder is here"),
        (str(tmp_path), "no model.safetensors"),
    ):
        with pytest.raises(UserError, match=words):
            load_dinov2(name)
