"""Push weights with their model card to the Hugging Face Hub, from which `hub:owner/name` loads them.

The token comes from `hf auth login` or HF_TOKEN.
"""

import argparse
from pathlib import Path

from dpt.commands.options import add_card_options, write_card
from dpt.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="exported weights (of dpt export), a run's folder, or a pipeline")
    add("hub_name", metavar="OWNER/NAME", help="model on the hub, created if missing")
    add("--private", action="store_true", help="create it as private (an existing one keeps its setting)")
    add("--revision", "--branch", default="", help="branch, created if missing (default: main)")
    add("--message", default="", help="commit message")
    add_card_options(parser)


def run(arguments: argparse.Namespace) -> None:
    from dpt.models.pretrained import read_config
    from dpt.models.weight_files import PIPELINE_INDEX
    from dpt.publishing.push import push_folder

    folder: Path = arguments.folder
    if not (folder / "config.json").is_file() and (folder / "weights" / "config.json").is_file():
        folder = folder / "weights"  # in a run's folder
    ours = (folder / "weights.safetensors").is_file() and (folder / "config.json").is_file()
    if not ours and not (folder / PIPELINE_INDEX).is_file():
        raise UserError(f"{folder}: neither exported weights nor a pipeline; write one with dpt export.")
    if ours:
        config = read_config(folder)
        if arguments.uri or arguments.run or arguments.license or not (folder / "README.md").is_file():
            name = arguments.name or arguments.hub_name.partition("@")[0]
            write_card(arguments, config.pop("model"), config, form="dpt", name=name, folder=folder)
    elif not (folder / "README.md").is_file():
        raise UserError(f"{folder}: has no README.md, the model card; export the pipeline again.")
    print(
        push_folder(
            folder, arguments.hub_name, private=arguments.private, revision=arguments.revision, message=arguments.message
        )
    )
