"""Train and measure the small VAEs embedded in the package.

    python -m data_tools.train_vae --out runs/vae            # train, measure, write the model card
    python -m data_tools.train_vae --evaluate dpt/assets/vae # measure again

It learns from the synthetic scenes (pictures, depth, flow, masks, objects on white), from the photos that scikit-image and
scikit-learn bundle, except the astronaut, which is for measuring, and from dead leaves in those photos' colours. Every batch
is a function of (seed, step), so a stopped run resumes from its last checkpoint as if never stopped.
"""

import copy
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.vae_images import (
    KIND_WEIGHTS,
    RESOLUTION,
    SYNTHETIC,
    bundled_photos,
    leaf_images,
    sample_batch,
    synthetic_images,
)
from data_tools.vae_measures import figures_table, measure, measure_speed, save_vae, write_card
from data_tools.vae_network import BLOCK_OUT_CHANNELS, build_vae, widened
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Range, numeric
from dpt.config.parser import Parser
from dpt.data.codec import load_vae
from dpt.distributed import log
from dpt.errors import UserError, reported
from dpt.progress import Progress, progress
from dpt.tasks import image_to_float

CHECKPOINT = "checkpoint.pt"
_LEAST_SQUARED = 1e-4
"""A squared error, 46 dB of PSNR, below which there is little to gain."""


def _setting(default: Any, allowed: Range, text: str) -> Any:
    """A field for a number in a range, with its help."""
    return field(default=default, metadata={"help": text, "range": allowed})


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """One training run; the defaults are those of the embedded VAE."""

    steps: int = _setting(9000, AT_LEAST_1, "optimizer steps")
    batch_size: int = _setting(4, AT_LEAST_1, "crops per step")
    crop: int = _setting(128, Range(least=8, most=RESOLUTION), "side of the crops in pixels, a multiple of 8")
    learning_rate: float = _setting(0.01, POSITIVE, "of Muon; the last half of the steps takes it to 0")
    adam_learning_rate: float = _setting(1e-3, POSITIVE, "of AdamW, for all but the inner convolutions")
    warmup_steps: int = _setting(40, AT_LEAST_1, "steps of linear warm-up")
    ema_decay: float = _setting(0.995, Range(least=0, below=1), "decay of the averaged weights, which are the ones kept")
    kl_weight: float = _setting(1e-4, NOT_NEGATIVE, "weight of the KL divergence per latent number")
    absolute_weight: float = _setting(0.1, NOT_NEGATIVE, "weight of the L1 error, for the many easy pixels")
    log_weight: float = _setting(0.1, NOT_NEGATIVE, "weight of the log of each crop's squared error: of its PSNR")
    scenes: int = _setting(500, AT_LEAST_1, "synthetic scenes to learn from")
    leaves: int = _setting(400, AT_LEAST_1, "dead-leaves pictures to learn from")
    synthetic: float = _setting(1.0, POSITIVE, "how often the scenes' images are drawn, relative to the usual")
    latent_channels: int = _setting(4, AT_LEAST_1, "channels of the latents")
    seed: int = _setting(0, NOT_NEGATIVE, "seed of scenes, crops, noise and initial weights")

    def __post_init__(self) -> None:
        for entry in fields(self):
            entry.metadata["range"].check(f"--{entry.name.replace('_', '-')}", getattr(self, entry.name))
        if self.crop % 8:
            raise UserError(f"--crop is {self.crop}; it must be a multiple of 8.")


# --- training -----------------------------------------------------------------------------------------------------------


def vae_loss(vae: Any, images: Tensor, noise: Tensor, config: VAETraining) -> tuple[Tensor, Tensor]:
    """The loss and the KL divergence per latent number (Kingma and Welling 2014, eq. 10).

    The reconstruction error is a sum of L1 and the log of each image's squared error (so that hard images do not outweigh the
    others), weighted by the config.
    noise: standard normal, [B, C, h, w].
    """
    posterior = vae.encode(images).latent_dist
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    error = vae.decode(posterior.mean + posterior.std * noise).sample - images
    squared = error.square().mean(dim=(1, 2, 3))
    loss = config.absolute_weight * error.abs().mean() + config.log_weight * (squared + _LEAST_SQUARED).log().mean()
    return loss + config.kl_weight * kl, kl


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: it halves the steps that AdamW takes to the same loss here.

    The update is Nesterov momentum, as an [out, in * 9] matrix, with its singular values brought near 1 by five Newton-Schulz
    steps (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; torch's own takes no convolutions).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param.grad))
                momentum.lerp_(param.grad, 1.0 - group["momentum"])
                update = _orthogonal(param.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                param.add_(update.reshape(param.shape), alpha=-group["lr"] * scale)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1; no more rows than columns are worked on."""
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def _optimizers(vae: Any, config: VAETraining) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between features, AdamW for the rest (first and last convolutions, norms, biases)."""
    inner = [p for p in vae.parameters() if p.ndim == 4 and min(p.shape[:2]) >= 8]
    known = {id(p) for p in inner}
    rest = [p for p in vae.parameters() if id(p) not in known]
    adamw = torch.optim.AdamW(rest, lr=config.adam_learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    return [Muon(inner, lr=config.learning_rate), adamw]


def _rate(step: int, config: VAETraining) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear to 0 over the last half."""
    return min(1.0, (step + 1) / config.warmup_steps, 2.0 * (1.0 - step / config.steps))


def train(
    config: VAETraining, images: dict[str, list[np.ndarray]], out: Path, *, initial: str = "", checkpoint_every: int = 250
) -> Any:
    """Train, with regular checkpoints in `out`, from which a stopped run resumes. Returns the averaged VAE, in fp32.

    initial: the VAE (as for `load_vae`) to start from, of the same shape or with fewer latent channels; none: random weights.
    """
    vae = build_vae(config.seed, config.latent_channels)
    if initial:
        given = load_vae(initial, downsampling=8)
        shapes = {name: weight.shape for name, weight in build_vae(config.seed, given.latent_channels).state_dict().items()}
        state = given.vae.state_dict()
        if given.latent_channels > config.latent_channels or shapes != {name: weight.shape for name, weight in state.items()}:
            raise UserError(
                f"--initial {initial} is no VAE of block_out_channels {BLOCK_OUT_CHANNELS} with at most "
                f"--latent-channels {config.latent_channels}; choose one that this command made, or more channels."
            )
        vae.load_state_dict(widened(state, vae))
    averaged = copy.deepcopy(vae)
    optimizers = _optimizers(vae, config)
    schedules: list[Any] = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, config)) for o in optimizers]
    parts: dict[str, Any] = {"vae": vae, "averaged": averaged}
    parts |= {f"part {i}": part for i, part in enumerate([*optimizers, *schedules])}
    start = _resume(out / CHECKPOINT, config, parts)
    bar: Progress[int]
    with progress(config.steps - start, "training the VAE", "step") as bar:
        for step in range(start, config.steps):
            loss, kl = _backward(vae, images, step, config)
            for part in (*optimizers, *schedules):
                part.step()
            _average(averaged, vae, min(config.ema_decay, (1 + step) / (10 + step)))
            bar.update(1, f"loss {loss:.4f}, kl {kl:.2f}")
            if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
                state = {name: part.state_dict() for name, part in parts.items()}
                _save_atomically({**state, "step": step + 1, "config": asdict(config)}, out / CHECKPOINT)
    return averaged


def _backward(vae: Any, images: dict[str, list[np.ndarray]], step: int, config: VAETraining) -> tuple[float, float]:
    """Compute the gradients of the batch of `step`; returns its loss and KL divergence."""
    count, side = config.batch_size, config.crop // 8
    weights = KIND_WEIGHTS | {kind: KIND_WEIGHTS[kind] * config.synthetic for kind in SYNTHETIC}
    batch = sample_batch(images, np.random.default_rng([config.seed, step]), count, config.crop, weights)
    noise = torch.randn(
        count, config.latent_channels, side, side, generator=torch.Generator().manual_seed(config.seed * 2**32 + step)
    )
    loss, kl = vae_loss(vae, batch, noise, config)
    vae.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    return float(loss.detach()), float(kl.detach())


@torch.no_grad()
def _average(averaged: Any, vae: Any, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(vae.parameters()), 1.0 - decay)


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(path: Path, config: VAETraining, parts: dict[str, Any]) -> int:
    """Load the checkpoint, if there is one, into modules, optimizers and schedules; return the step to continue from."""
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds, and advises to trust the file
        raise UserError(f"{path} is damaged or no checkpoint of this command; remove it, or choose another --out.") from error
    if not isinstance(state, dict) or "config" not in state or state["config"] != asdict(config):
        raise UserError(f"{path} is of a run with other settings; give them again or choose another --out.")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


# --- command ------------------------------------------------------------------------------------------------------------


def report(out: Path, scenes: int, seed: int) -> tuple[dict[str, float], tuple[float, float]]:
    """Measure the VAE in `out` and print the figures."""
    codec = load_vae(str(out))
    figures, speed = measure(codec, scenes, seed=seed), measure_speed(codec)
    log(figures_table(figures))
    log(f"latents: std {figures['latent_std']:.3f}, posterior noise {figures['latent_noise']:.3f}")
    log(f"speed at {RESOLUTION} px: {speed[0]:.0f} images/s encoded, {speed[1]:.0f} decoded")
    return figures, speed


def parser() -> Parser:
    parser = Parser(prog="python -m data_tools.train_vae", description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the VAE and its checkpoint; a run stopped there resumes")
    where.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the VAE in this folder, without training")
    parser.add_argument(
        "--eval-scenes", type=numeric(int, AT_LEAST_1), default=64, help="unseen scenes to measure on (default: 64)"
    )
    parser.add_argument(
        "--initial",
        default="",
        help="VAE to start from, of the same shape or with fewer latent channels (default: random weights)",
    )
    parser.add_argument("--note", default="", help="what the model card says beside the command, such as changes along the way")
    for entry in fields(VAETraining):
        flag, read = f"--{entry.name.replace('_', '-')}", numeric(type(entry.default), entry.metadata["range"])
        parser.add_argument(flag, type=read, default=entry.default, help=entry.metadata["help"])
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train or measure; bad input, and files that cannot be written, end it with one sentence and exit code 2."""
    given = vars(parser().parse_args(arguments))
    with reported("train_vae"):
        config = VAETraining(**{entry.name: given[entry.name] for entry in fields(VAETraining)})
        if given["evaluate"] is not None:
            report(given["evaluate"], given["eval_scenes"], config.seed)
        else:
            make_vae(config, given["out"], given["eval_scenes"], initial=given["initial"], note=given["note"])
    return 0


def make_vae(config: VAETraining, out: Path, eval_scenes: int, *, initial: str = "", note: str = "") -> None:
    """Train (or resume), save, measure and write the model card with its `note`, all in `out`."""
    photos = {**bundled_photos(), "leaves": leaf_images(config.leaves, seed=config.seed)}
    synthetic = synthetic_images("train", config.scenes, seed=config.seed)
    images = {**photos, **synthetic}
    averaged = train(config, images, out, initial=initial)
    centred = [image_to_float(image) for kind in sorted(synthetic) for image in synthetic[kind][:32]]
    save_vae(averaged, torch.from_numpy(np.stack(centred)), out)
    figures, speed = report(out, eval_scenes, config.seed)
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(config).items())
    start = f"--initial {initial} " if initial else ""
    write_card(out, f"python -m data_tools.train_vae --out DIR {start}{given}", figures, eval_scenes, speed, note=note)


if __name__ == "__main__":
    sys.exit(main())
