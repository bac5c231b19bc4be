"""What the server of the page answers beside it, as JSON: scores for programs, whether it is ready, what it runs."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from serving.answers import MAX_PROMPT, MAX_WAITING, Answers, Busy
from serving.scorer import Scorer
from sources.scores import columns_of
from training import checkpoints, run_folder

MAX_BODY = 100 * 2**20  # bytes, as of the page's uploads
HOW = "send a form: image, a file, and prompt, a text, which may be left out"


def build_routes(answers: Answers, about: Mapping[str, Any], accounts: Mapping[str, str]) -> list[BaseRoute]:
    """POST /score, GET /health and GET /version.

    Args:
        about: what /version answers.
        accounts: password by user, asked for by HTTP Basic; without any, nobody is asked. /health never asks.
    """
    router = APIRouter()
    guarded: dict[str, Any] = {"dependencies": [Depends(password_check(accounts))] if accounts else []}

    @router.post("/score", **guarded)
    async def score(request: Request) -> JSONResponse:
        size = request.headers.get("content-length", "")
        if not size.isdecimal():
            raise HTTPException(411, "the request does not say how long it is")
        if int(size) > MAX_BODY:
            raise HTTPException(413, f"{size} bytes, at most {MAX_BODY}")
        try:
            answers.check_room()  # before the image is sent
            async with request.form(max_files=1, max_fields=1, max_part_size=8 * MAX_PROMPT) as form:
                image, prompt = form.get("image"), form.get("prompt", "")
                if not isinstance(image, UploadFile) or not isinstance(prompt, str):
                    raise HTTPException(400, HOW)
                return JSONResponse(await answers.score_one(image.filename or "image", image.file, prompt))
        except Busy as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except ClientDisconnect:
            raise HTTPException(400, "the rest of the request did not come") from None

    @router.get("/health")
    async def health() -> JSONResponse:
        state = {"ready": answers.has_room, "waiting": answers.num_waiting, "max_waiting": MAX_WAITING}
        return JSONResponse(state, 200 if answers.has_room else 503)

    @router.get("/version", **guarded)
    async def version() -> JSONResponse:
        return JSONResponse(dict(about))

    return router.routes


def password_check(accounts: Mapping[str, str]) -> Callable[[Request], None]:
    """What raises HTTPException unless a request brings a user and the password that goes with it, by HTTP Basic."""

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Basic ")
        try:
            user, _, password = base64.b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            user = password = ""
        if user not in accounts or not secrets.compare_digest(password.encode(), accounts[user].encode()):
            raise HTTPException(401, "wrong user or password", {"WWW-Authenticate": 'Basic realm="image scores"'})

    return check


def describe(scorer: Scorer, checkpoint: Path) -> dict[str, Any]:
    """What /version answers: the checkpoint with the digest of its weights, its scales, the device, the versions."""
    weights = checkpoints.weights_folder(checkpoint) / checkpoints.WEIGHTS_FILE
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    scales = {columns_of(task)[1]: [scale.low, scale.high] for task, scale in scorer.scales.items()}
    return {
        "checkpoint": str(checkpoint),
        "sha256": digest.hexdigest(),
        "scales": scales,
        "device": scorer.runtime.describe(),
        **run_folder.environment(),
    }
