"""The commands that make the shards of the paper's studies (docs/reproduce.md shows the same ones; a test compares them)."""

from pathlib import Path

FOLDER = "data/shards"
VAE = "stabilityai/sd-vae-ft-ema"
ARGUMENTS = {
    "imagenet_256/train": "--dataset imagenet --root DIR/imagenet --split train --resolution 256 --mirrored",
    "imagenet_512/train": "--dataset imagenet --root DIR/imagenet --split train --resolution 512 --mirrored",
    "hypersim_256/train": "--dataset hypersim --root DIR/hypersim --split train --resolution 256",
    "hypersim_512/train": "--dataset hypersim --root DIR/hypersim --split train --resolution 512",
    "hypersim_256/val": "--dataset hypersim --root DIR/hypersim --split val --resolution 256 --evaluation",
    "hypersim_512/val": "--dataset hypersim --root DIR/hypersim --split val --resolution 512 --evaluation",
    "nyuv2_512/test": "--dataset nyuv2 --root DIR/nyuv2 --split test --resolution 512 --evaluation",
    "scannet_512/test": "--dataset scannet --root DIR/scannet --split test --resolution 512 --evaluation",
    "eth3d_512/test": "--dataset eth3d --root DIR/eth3d --split test --resolution 512 --evaluation",
    "diode_512/val": "--dataset diode --root DIR/diode --split val --resolution 512 --evaluation",
    "kitti_512/test": "--dataset kitti --root DIR/kitti --split test --resolution 512 --evaluation",
    "flying_chairs_512/train": "--dataset flying_chairs --root DIR/flying_chairs --split train --resolution 512",
    "flying_chairs_512/val": "--dataset flying_chairs --root DIR/flying_chairs --split val --resolution 512 --evaluation",
    "pix2gestalt_256/train": "--dataset pix2gestalt --root DIR/pix2gestalt --split train --resolution 256 --clip CLIP",
    "pix2gestalt_256/val": "--dataset pix2gestalt --root DIR/pix2gestalt --split val --resolution 256 --evaluation --clip CLIP",
    "coco_amodal_256/val": "--dataset coco_amodal --root DIR/coco_amodal --split val --resolution 256 --evaluation --clip CLIP",
    "mp3d_amodal_256/test": "--dataset mp3d_amodal --root DIR/mp3d_amodal --split test --resolution 256 --evaluation "
    "--clip CLIP",
    "pix2gestalt_512/train": "--dataset pix2gestalt --root DIR/pix2gestalt --split train --resolution 512 --clip CLIP",
    "pix2gestalt_512/val": "--dataset pix2gestalt --root DIR/pix2gestalt --split val --resolution 512 --evaluation --clip CLIP",
    "coco_amodal_512/val": "--dataset coco_amodal --root DIR/coco_amodal --split val --resolution 512 --evaluation --clip CLIP",
    "mp3d_amodal_512/test": "--dataset mp3d_amodal --root DIR/mp3d_amodal --split test --resolution 512 --evaluation "
    "--clip CLIP",
}
"""Arguments of `data_tools.encode`, besides --vae and --out, by folder below data/shards. DIR: where the downloaded sets are;
CLIP: the CLIP image tower, a folder or the hub name that docs/reproduce.md gives."""

IMAGES = {"hypersim": 7370, "nyuv2": 654, "scannet": 800, "eth3d": 454, "diode": 771, "kitti": 652, "flying_chairs": 640}
"""Number of images in each evaluation set, where published."""


def images_of(shards: str) -> int:
    """Number of images in a published evaluation set of shards; 0: unknown."""
    arguments = ARGUMENTS.get(shards.removeprefix(FOLDER + "/"), "").split()
    return IMAGES.get(arguments[1], 0) if "--evaluation" in arguments else 0


def encode_command(shards: str) -> str:
    """The command that makes a shard folder, e.g. "data/shards/hypersim_256/val"; empty if it is not one of the paper's."""
    name = shards.removeprefix(FOLDER + "/")
    if name == shards or name not in ARGUMENTS:
        return ""
    return f"python -m data_tools.encode {ARGUMENTS[name]} --vae {VAE} --out {shards}"


def how_to_make(needed: str) -> str:
    """A line that names what is missing and how to make it."""
    if command := encode_command(needed):
        return f"  {needed}: {command}"
    if needed.startswith("runs/quickstart/"):
        return f"  {needed}: make quickstart"
    where = "docs/science.md" if needed.startswith("runs/") else "docs/reproduce.md"
    kind = "shards" if "shards" in Path(needed).parts else "file"
    return f"  {needed}: {kind}; {where} says how to get it"
