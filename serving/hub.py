"""Scorers on the Hugging Face hub: `hf-hub:ORG/NAME` in, a checkpoint folder in the hub's cache out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from backbones.download import HF_HUB, quiet
from backbones.tokenizers import TOKENIZER_DIR
from storage import tensors
from storage.messages import one_line, quoted
from training import checkpoints

HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library, which changes with the hub's


def local_folder(place: str | Path) -> Path:
    """The checkpoint folder that is meant; one on the hub is fetched, or found in the hub's cache.

    Fetched are a description, weights, and the files of a tokenizer that these vouch for, all of one commit.

    Raises:
        ValueError: it cannot be had, or is no scorer; one line.
    """
    name = str(place)
    if not name.startswith(HF_HUB):
        return Path(place)
    description = fetch(name, checkpoints.DESCRIPTION_FILE)
    folder, commit = description.parent, description.parent.name
    weights = fetch(name, checkpoints.WEIGHTS_FILE, commit)
    with checkpoints.damage_errors(folder):
        files = sorted(dict(tensors.read_note(weights)["files"]))
    for file in files:
        if not re.fullmatch(rf"{checkpoints.DESCRIPTION_FILE}|{TOKENIZER_DIR}/\w[\w.-]*", file, re.ASCII):
            raise ValueError(f"{name}: is no scorer of this program (wants {quoted(file)})")
        fetch(name, file, commit)
    return folder


def fetch(name: str, file: str, commit: str | None = None) -> Path:
    """A file of `hf-hub:ORG/NAME` in the hub's cache. Raises ValueError."""
    try:
        with hub_errors(name):
            return Path(hf_hub_download(name.removeprefix(HF_HUB), file, revision=commit))
    except ValueError as error:
        if not isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise
        raise ValueError(f"{name}: is no scorer of this program, {file} is missing") from None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what the hub, or the way to it, refuses about a repository into a ValueError of one line."""
    try:
        with quiet():
            yield
    except Exception as error:  # hub, HTTP and socket errors share no base; the cause is kept
        raise ValueError(f"{name}: {reason(error, name.removeprefix(HF_HUB))}") from error


def reason(error: Exception, repository: str) -> str:
    """What it is that went wrong, and what to do."""
    hub, cause = constants.ENDPOINT, error.__cause__
    if isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        return reason(cause, repository)
    if isinstance(error, LocalTokenNotFoundError):
        return "needs a login: hf auth login, or HF_TOKEN with a token that may write"
    if isinstance(error, GatedRepoError):
        return f"is gated: ask for access at {hub}/{repository}, then hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"not found on {hub}: check the name; if it is private, hf auth login as one who may read it"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, LocalEntryNotFoundError):
        way = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached: check the network"
        return f"is not in the cache, and {way}"
    if isinstance(error, HfHubHTTPError):
        code, said = error.response.status_code, one_line(error.server_message or error)
        if code == 401:
            return "the login is not accepted: hf auth login --force, or another HF_TOKEN"
        if code == 403:
            return f"your login may not do that ({said}): take a token that may write, or a name of your own"
        return f"{hub} answers {code} ({said})"
    if isinstance(error, HTTPError):
        return f"{hub} cannot be reached ({one_line(error)}): check the network"
    return one_line(str(error) or type(error).__name__)
