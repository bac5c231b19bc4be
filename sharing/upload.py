"""A checkpoint and its model card on the Hugging Face hub: shown, asked for, sent."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError

from backbones.download import HF_HUB
from backbones.tokenizers import TOKENIZER_DIR
from serving import hub
from serving.scorer import Scorer
from sharing.card import card_text, public_source, run_of
from sharing.folder import CARD
from training import checkpoints


def push(args: argparse.Namespace) -> None:
    """Send --checkpoint to the repository --push_to_hub, once a person has seen what is sent and agrees.

    Raises:
        ValueError: it is no checkpoint, the hub refuses, or nobody agrees; one line. OSError: no room for a copy.
    """
    repository, place = args.push_to_hub, hub.local_folder(args.checkpoint)
    scorer = Scorer.load(place, device="cpu")
    words = {"name": repository.partition("/")[2], "license_name": args.license or "", "repository": repository}
    card = card_text(scorer, run_of(place), **words)
    api = HfApi()
    with hub.hub_errors(f"--push_to_hub {repository}"):
        user = api.whoami()["name"]
        found = find(api, repository)
    refuse_foreign(repository, found, public=args.public)
    with TemporaryDirectory(prefix="shared-scorer-") as made:
        folder = Path(made) / "scorer"
        write_public(place, folder)
        (folder / CARD).write_text(card, encoding="utf-8", errors="replace")
        show(folder, card, f"{repository} on {api.endpoint}, {state_of(found, public=args.public)}; as {user}")
        if not args.yes and not agrees():
            raise ValueError("--push_to_hub: nothing was sent")
        with hub.hub_errors(f"--push_to_hub {repository}"):
            send(api, repository, folder, found, public=args.public)
    print(f"sent: {api.endpoint}/{repository}")
    print(f"python predict.py --checkpoint {HF_HUB}{repository} IMAGE...")


def find(api: HfApi, repository: str) -> ModelInfo | None:
    """The repository as it is now; None if there is none, or none that may be seen."""
    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


def refuse_foreign(repository: str, found: ModelInfo | None, *, public: bool) -> None:
    """Raise ValueError for a repository that holds something else, or that others see though nobody said so."""
    if found is None:
        return
    files = {file.rfilename for file in found.siblings or []} - {".gitattributes"}
    if files and checkpoints.DESCRIPTION_FILE not in files:
        raise ValueError(f"--push_to_hub {repository}: holds other things than a scorer; choose a new name")
    if not found.private and not public:
        raise ValueError(f"--push_to_hub {repository}: everybody sees it; add --public, or choose another name")


def state_of(found: ModelInfo | None, *, public: bool) -> str:
    """What becomes of a repository, in words."""
    if found is None:
        return f"new, {'public' if public else 'private'}"
    if public and found.private:
        return "replacing what is there, which becomes public with all that came before"
    return f"replacing what is there, {'public' if public else 'private'}"


def write_public(place: Path, folder: Path) -> None:
    """Write a checkpoint folder that scores the same, without paths of this machine. Raises NotWritten."""
    source, state, description = checkpoints.load_weights(place)

    def add_tokenizer(target: Path) -> None:
        if (source / TOKENIZER_DIR).is_dir():
            shutil.copytree(source / TOKENIZER_DIR, target / TOKENIZER_DIR)

    checkpoints.save_weights(folder, state, without_paths(description), add_tokenizer)


def without_paths(value: Any) -> Any:
    """Nested JSON values, of whose texts that are paths of this machine the last part stays."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    return public_source(value) if isinstance(value, str) else value


def show(folder: Path, card: str, target: str) -> None:
    """Print where it goes, the files with their sizes, and the card."""
    print(f"to        {target}")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"file      {path.relative_to(folder).as_posix()}, {path.stat().st_size:,} bytes")
    print(f"\n{CARD}:\n")
    print("".join(f"    {line}".rstrip() + "\n" for line in card.splitlines()), flush=True)


def agrees() -> bool:
    """Whether somebody at the terminal says yes. Raises ValueError if nobody is there."""
    if not sys.stdin.isatty():
        raise ValueError("--push_to_hub: nobody is at a terminal to agree to this; nothing was sent; add --yes")
    try:
        return input("send this? yes or no: ").strip().lower() in ("yes", "y")
    except EOFError:
        return False


def send(api: HfApi, repository: str, folder: Path, found: ModelInfo | None, *, public: bool) -> None:
    """Make the repository if need be, and put the files there in one commit."""
    if found is None:
        api.create_repo(repository, private=not public)
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="A scorer and its card",
        delete_patterns=f"{TOKENIZER_DIR}/*",  # those of another scorer that was here
    )
    if public and found is not None and found.private:
        api.update_repo_settings(repository, private=False)
