"""The script that makes the embedded VAE, and the figures in its model card."""

import re

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch.distributions import Normal, kl_divergence

from data_tools import train_vae, vae_network
from data_tools.train_vae import CHECKPOINT, Muon, VAETraining, build_vae, main, parser, train, vae_loss, widened
from data_tools.vae_images import KIND_WEIGHTS, astronaut, bundled_photos, leaf_images, sample_batch, synthetic_images
from data_tools.vae_measures import FLOORS_DB, centre_latents, measure, psnr
from dpt.data.codec import load_vae
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError

TINY = VAETraining(steps=4, batch_size=2, crop=16, scenes=1, leaves=1, warmup_steps=1)


@pytest.fixture(scope="module")
def images():
    """The images of two training scenes and the photos, by kind."""
    return {**bundled_photos(), "leaves": leaf_images(2), **synthetic_images("train", 2)}


@pytest.fixture
def tiny_vae(monkeypatch):
    """Make `build_vae` build a VAE that trains in no time."""
    monkeypatch.setattr(vae_network, "BLOCK_OUT_CHANNELS", (8, 8, 8, 8))


# --- the embedded VAEs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(EMBEDDED_VAES))
def name(request):
    """An embedded VAE's name."""
    return request.param


@pytest.fixture(scope="module")
def figures(name):
    """The embedded VAE's figures on eight unseen scenes and the astronaut."""
    return measure(load_vae(name), 8)


@pytest.fixture
def card(name):
    """The embedded VAE's model card."""
    return (EMBEDDED_VAES[name] / "README.md").read_text()


@pytest.mark.parametrize("kind", sorted(FLOORS_DB))
def test_embedded_vaes_reach_their_floors(figures, kind):
    assert figures[kind] >= FLOORS_DB[kind]


def test_more_channels_keep_more():
    few, many = (measure(load_vae(name), 2) for name in ("embedded", "embedded16"))
    assert all(many[kind] > few[kind] + 2 for kind in FLOORS_DB)


def test_model_card_admits_the_floors_it_misses(figures, card):
    for kind in FLOORS_DB:
        assert (f"{kind} images are below" in card) == (figures[kind] < FLOORS_DB[kind])


def test_scaled_latents_have_unit_standard_deviation(figures):
    assert figures["latent_std"] == pytest.approx(1.0, abs=0.1)


def test_model_card_says_what_is_measured(name, figures, card):
    told = {kind: float(value) for kind, value in re.findall(r"^\| (\w+) \| ([\d.]+) \|", card, re.MULTILINE)}
    assert told.keys() == FLOORS_DB.keys()
    assert told["astronaut"] == pytest.approx(figures["astronaut"], abs=0.05)
    for kind in FLOORS_DB:  # eight scenes of the card's many
        assert told[kind] == pytest.approx(figures[kind], abs=1.5)
    assert str(load_vae(name).scaling_factor) in card


def test_model_card_s_command_sets_every_field_as_the_script_reads_it(name, card):
    words = re.search(r"python -m data_tools\.train_vae --out DIR (.*)", card)[1].split()
    given = vars(parser().parse_args(["--out", "DIR", *words]))
    assert {flag[2:].replace("-", "_") for flag in words[::2]} >= vars(VAETraining()).keys()
    config = VAETraining(**{field: given[field] for field in vars(VAETraining())})
    assert config.latent_channels == load_vae(name).latent_channels
    if name == "embedded":
        assert config == VAETraining()


# --- images ---------------------------------------------------------------------------------------------------------------


def test_astronaut_is_held_out(images):
    from skimage import data

    assert not any(np.array_equal(photo, data.astronaut()) for kind in ("photo", "texture") for photo in images[kind])
    assert astronaut().shape == (3, 256, 256)


def test_batches_follow_from_their_seed(images):
    assert images.keys() == KIND_WEIGHTS.keys()
    first, again = (sample_batch(images, np.random.default_rng(3), 24, 64, KIND_WEIGHTS) for _ in range(2))
    assert first.shape == (24, 3, 64, 64)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, sample_batch(images, np.random.default_rng(4), 24, 64, KIND_WEIGHTS))


def test_dead_leaves_have_the_spectrum_of_photos(images):
    """Power falls with about the square of the frequency, as in natural images (Field 1987)."""
    for picture in images["leaves"]:
        assert picture.shape == (256, 256, 3)
        grey = picture.mean(axis=2)
        power = np.abs(np.fft.fft2((grey - grey.mean()) * np.hanning(256)[:, None] * np.hanning(256))) ** 2
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
        rings = [power[(radius >= f) & (radius < 2 * f)].mean() for f in (1 / 64, 1 / 32, 1 / 16, 1 / 8)]
        slope = np.polyfit(np.arange(4), np.log2(rings), 1)[0]
        assert -3.5 < slope < -1.0
    np.testing.assert_array_equal(images["leaves"][0], leaf_images(1)[0])


def test_masks_and_white_grounds_keep_their_values(images):
    masks = sample_batch({"mask": images["mask"]}, np.random.default_rng(0), 8, 128, KIND_WEIGHTS)
    assert set(masks.unique().tolist()) == {-1.0, 1.0}
    whole = sample_batch({"whole": images["whole"]}, np.random.default_rng(0), 8, 128, KIND_WEIGHTS)
    assert (whole == 1.0).all(dim=1).float().mean() > 0.3


# --- training -------------------------------------------------------------------------------------------------------------


def test_loss_and_kl_are_those_computed_apart(tiny_vae):
    vae = build_vae(0)
    batch = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = vae.encode(batch).latent_dist
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).mean()
    loss, kl = vae_loss(vae, batch, torch.zeros(2, 4, 2, 2), TINY)
    torch.testing.assert_close(kl, expected)
    error = vae.decode(posterior.mean).sample - batch
    squared = (error[0].square().mean() + 1e-4).log() + (error[1].square().mean() + 1e-4).log()
    parts = TINY.absolute_weight * error.abs().mean() + TINY.log_weight * squared / 2 + TINY.kl_weight * kl
    torch.testing.assert_close(loss, parts)


def test_widening_keeps_latents_and_reconstructions(tiny_vae):
    few, many, batch = build_vae(0), build_vae(1, 6), torch.rand(2, 3, 32, 32) * 2 - 1
    many.load_state_dict(widened(few.state_dict(), many))
    with torch.no_grad():
        before, after = (vae.encode(batch).latent_dist for vae in (few, many))
        torch.testing.assert_close(after.mean[:, :4], before.mean)
        torch.testing.assert_close(after.logvar[:, :4], before.logvar)
        latents = torch.cat([before.mean, torch.zeros_like(after.mean[:, 4:])], dim=1)
        torch.testing.assert_close(many.decode(latents).sample, few.decode(before.mean).sample)
        assert after.mean[:, 4:].std() > 0


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (16, 8, 1, 1), (8, 8, 3, 3)])
def test_muon_steps_in_every_direction_alike(shape):
    """The update's singular values are near 1 times the learning rate (and times sqrt(out / in) of tall matrices)."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    Muon([weight], lr=0.1).step()
    values = torch.linalg.svdvals(weight.detach().flatten(1)) / 0.1 / max(1.0, shape[0] / weight[0].numel()) ** 0.5
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert (weight.detach() * weight.grad).sum() < 0


def test_a_stopped_run_goes_on_as_if_it_had_not(tiny_vae, images, tmp_path, monkeypatch):
    whole = train(TINY, images, tmp_path / "whole")
    backward = train_vae._backward

    def stop_at_three(vae, images, step, config):
        if step == 3:
            raise KeyboardInterrupt
        return backward(vae, images, step, config)

    monkeypatch.setattr(train_vae, "_backward", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, images, tmp_path / "stopped", checkpoint_every=2)
    monkeypatch.setattr(train_vae, "_backward", backward)
    resumed = train(TINY, images, tmp_path / "stopped", checkpoint_every=2)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_checkpoint_of_other_settings_is_refused(tiny_vae, images, tmp_path):
    train(TINY, images, tmp_path)
    with pytest.raises(UserError, match=CHECKPOINT):
        train(VAETraining(steps=5, batch_size=2, crop=16, scenes=1, leaves=1), images, tmp_path)


@pytest.mark.parametrize(("channels", "blocks"), [(8, (8, 8, 8, 8)), (4, (8, 8, 8, 16))])
def test_initial_weights_of_another_shape_are_refused(tiny_vae, images, tmp_path, monkeypatch, channels, blocks):
    monkeypatch.setattr(vae_network, "BLOCK_OUT_CHANNELS", blocks)
    build_vae(0, channels).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(vae_network, "BLOCK_OUT_CHANNELS", (8, 8, 8, 8))
    with pytest.raises(UserError, match="is no VAE of block_out_channels"):
        train(TINY, images, tmp_path / "vae", initial=str(tmp_path / "other"))


def test_centring_changes_no_reconstruction(tiny_vae):
    torch.manual_seed(1)
    vae, batch = build_vae(0), torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(batch).latent_dist.mean).sample
        std = centre_latents(vae, batch)
        means = vae.encode(batch).latent_dist.mean
        torch.testing.assert_close(vae.decode(means).sample, before, rtol=0, atol=1e-5)
    torch.testing.assert_close(means.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    assert std == pytest.approx(float(means.std()), rel=1e-4)


def test_psnr_is_that_of_skimage():
    generator = torch.Generator().manual_seed(0)
    truth, image = (torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    expected = [peak_signal_noise_ratio(t.numpy(), i.numpy(), data_range=2) for t, i in zip(truth, image, strict=True)]
    np.testing.assert_allclose(psnr(image, truth), expected, rtol=1e-5)


# --- command --------------------------------------------------------------------------------------------------------------


def test_command_makes_a_vae_that_loads_and_a_card(tiny_vae, tmp_path, capsys):
    settings = ["--steps", "2", "--batch-size", "2", "--crop", "16", "--scenes", "1", "--leaves", "1", "--eval-scenes", "1"]
    assert main(["--out", str(tmp_path), *settings]) == 0
    assert "| astronaut |" in capsys.readouterr().out
    codec = load_vae(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert f"`scaling_factor` = {codec.scaling_factor}," in card
    assert "--steps 2 --batch-size 2 --crop 16" in card
    wide = tmp_path / "wide"
    assert main(["--out", str(wide), *settings, "--initial", str(tmp_path), "--latent-channels", "8"]) == 0
    assert load_vae(str(wide)).latent_channels == 8
    assert f"--initial {tmp_path} --steps 2" in (wide / "README.md").read_text()
    assert main(["--evaluate", str(tmp_path), "--eval-scenes", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "x", "--steps", "0"], "--steps: '0' is no whole number at least 1"),
        (["--out", "x", "--crop", "20"], "--crop is 20; it must be a multiple of 8"),
        (["--evaluate", "/no/such/folder"], "neither"),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, sentence, refused):
    assert sentence in refused(main, *arguments)
