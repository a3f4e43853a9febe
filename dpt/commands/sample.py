"""Sample class-conditional images."""

import argparse
from pathlib import Path

from dpt.commands.options import add_sampling_options, sampling_config
from dpt.config.numbers import COUNT, NATURAL
from dpt.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--labels", required=True, help="class ids, e.g. 207,360,387")
    add("--per-label", type=COUNT, default=1, help="images per class")
    add("--out", type=Path, default=Path("samples"), help="folder of the images")
    add("--guidance-channels", type=NATURAL, default=0, help="guided latent channels; 0: all, public DiT: 3")
    add_sampling_options(parser, steps=250, guidance=4.0)


def run(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from dpt.evaluation.prediction import Predictor
    from dpt.training.export import load_weights

    try:
        labels = [int(label) for label in arguments.labels.split(",")]
    except ValueError:
        raise UserError(f'--labels "{arguments.labels}": give class ids, separated by commas.') from None
    predictor = Predictor(
        arguments.weights, config=sampling_config(arguments), vae=arguments.vae, device=arguments.device, read=load_weights
    )
    classes = predictor.model.num_classes
    if not all(0 <= label < classes for label in labels):
        raise UserError(f"--labels {arguments.labels}: the weights know classes 0 to {classes - 1}.")
    pairs = [(label, number) for label in labels for number in range(arguments.per_label)]
    names = [f"{label:04d}_{number:03d}" for label, number in pairs]
    images = predictor.generate(
        [label for label, _ in pairs], names, steps=arguments.steps, guidance_channels=arguments.guidance_channels
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        path = arguments.out / f"{name}.png"
        Image.fromarray(image).save(path)
        print(path)
