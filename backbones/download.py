"""What may need a network: fetched, or refused in one line that names the ways without one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOCAL_DIR, HF_HUB = "local-dir:", "hf-hub:"

OFFLINE_WAYS = (
    "Without a network: --clip_model local-dir:FOLDER (open_clip or transformers form), --clip_pretrained WEIGHTS_FILE "
    "(OpenAI's own .pt too), or --clip_model tiny --clip_pretrained assets"
)


def download(what: str, fetch: Callable[[], Any], ways: str = OFFLINE_WAYS) -> Any:
    """Run what may need a network; any failure becomes one line that names the ways without one."""
    try:
        with quiet():
            return fetch()
    except Exception as error:  # hub, HTTP and socket errors share no base; the cause is kept
        raise ValueError(f"cannot get {what}: {first_line(error)}. {ways}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without retries and reports of what was loaded in the libraries' logs: what matters is told in our one line."""
    noisy = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def first_line(error: Exception, *, skip: int = 0) -> str:
    """The first telling line of an error's message, cut where it is long; `skip` leaves out lines of mere title."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[min(skip, len(lines) - 1)] if lines else type(error).__name__
    return line.rstrip(".") if len(line) <= 160 else line[:157] + "..."
