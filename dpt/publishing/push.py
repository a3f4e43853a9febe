"""Push weight folders to the Hugging Face Hub with huggingface_hub's own token, never accepted or shown here."""

from pathlib import Path

from dpt import hub
from dpt.errors import UserError

_LEFT_OUT = (".*", "**/.*", "*.tmp", "**/__pycache__/*")


def push_folder(folder: Path, name: str, *, private: bool = False, revision: str = "", message: str = "") -> str:
    """Upload a folder's files as the model `owner/name` (with or without hub:), created if missing.

    private: for a newly created model (an existing one keeps its setting). revision: branch, created if missing; empty:
    main. Returns the commit's address. UserError, one sentence without the token, for whatever goes wrong.
    """
    place = hub.parse(name if hub.is_hub_name(name) else f"{hub.PREFIX}{name}")
    if place.path or (place.revision and revision):
        raise UserError(f"{name}: give owner/name, and a branch once, as @branch or with --revision.")
    branch = revision or place.revision
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set, and pushing needs the hub; unset it.")
    if not get_token():
        raise UserError(f"{name}: nobody is logged in; call `hf auth login`, or set HF_TOKEN to a token that may write.")
    api = HfApi(library_name="dpt")
    try:
        api.create_repo(place.repo, private=private or None, exist_ok=True)
        if branch and branch != "main":
            api.create_branch(place.repo, branch=branch, exist_ok=True)
        done = api.upload_folder(
            repo_id=place.repo,
            folder_path=folder,
            revision=branch or None,
            commit_message=message or f"Upload {folder.resolve().name}",
            ignore_patterns=list(_LEFT_OUT),
        )
    except Exception as error:  # httpx and the hub client raise a dozen types
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 403):
            raise UserError(
                f"{place.repo}: {constants.ENDPOINT} refuses to write with this token; call `hf auth login` with one that may."
            ) from error
        raise UserError(f"{place.repo}: could not be pushed to {constants.ENDPOINT} ({hub.one_line(error)}).") from error
    return str(done.commit_url)
