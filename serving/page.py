"""The page in the browser: its layout, and how it is served on this machine."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.routing import BaseRoute

from serving.answers import EMPTY, MAX_FILE_SIZE, MAX_PROMPT, MAX_WAITING, SUFFIXES, Answers, Upload
from serving.shared_scorer import MOST_AT_ONCE
from sources.scores import title_of

MAX_SESSIONS = 500  # whose tables Gradio keeps; each takes some 70 kB, and a call without its client is a session
STYLE = Path(__file__).with_name("app.css")


def hand_over_names(files: gr.File | gr.Image) -> None:
    """Make an input hand over `Upload`s: Gradio alone hands over paths, in which it has changed the names.

    A class derived from Gradio's would do the same, but Gradio then writes a file beside this one.
    """

    def uploads(payload: Any) -> list[Upload]:
        sent = payload.root if hasattr(payload, "root") else [payload] if payload else []
        return [Upload(file.orig_name or Path(file.path).name, Path(file.path)) for file in sent]

    files.preprocess = uploads  # type: ignore[assignment, method-assign]


LOOK_HELP = """
<details class="help" open><summary>What the maps show, and what they do not</summary>
<p>One patch after another is covered with the image's mean colour, and the image is scored again.
<b class="raises">Red</b>: the score falls when the patch is covered, so what is there raises it.
<b class="lowers">Blue</b>: the score rises when it is covered. The stronger the colour, the larger the change; each
map has its own scale below it. What is dark the model is not shown.</p>
<p>This is what the model reacts to, and not what people looked at. A flat patch is a change of its own, which the
model may like or dislike; what several patches show only together is not found by covering one; and the changes do
not add up to the score.</p></details>
"""


def build_page(answers: Answers, *, title: str = "") -> gr.Blocks:
    """The page for a model, which `title` names."""
    # One visitor's job at a time, in pieces between which requests for one image come in.
    event: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    with gr.Blocks(title="Image scores", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        build_api(answers)  # first: what comes later and has the name of one of the answers, gets another one
        name = f"<span>{html.escape(title)}</span>" if title else ""
        gr.HTML(f"<header><h1>What people would say of an image</h1>{name}</header>", js_on_load=None)
        with gr.Tab("Score"):
            build_score_tab(answers, event)
        with gr.Tab("Where it looked"):
            build_look_tab(answers, event)
        with gr.Tab("Table"):
            build_table_tab(answers, event)
        gr.HTML(answers.about_html(), js_on_load=None)
        page.unload(answers.leave)
    page.queue(max_size=MAX_WAITING)
    return page


def build_api(answers: Answers) -> None:
    """What Gradio's clients call as /score: an image and a prompt in, scores out. The page shows nothing of it."""
    image = gr.File(label="image", visible=False)
    hand_over_names(image)
    prompt = gr.Textbox(label="prompt", visible=False)
    scores = gr.JSON(label="scores", visible=False)
    gr.Button(visible=False).click(
        answers.score_upload,
        [image, prompt],
        scores,
        api_name="score",
        api_description="Scores of an image in MOS units; a prompt says what it should show.",
        concurrency_limit=MOST_AT_ONCE,
    )


def build_score_tab(answers: Answers, event: Mapping[str, Any]) -> None:
    """Several images, one prompt, a ranking."""
    tasks = list(answers.scorer.scales)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.File(file_count="multiple", file_types=SUFFIXES, label="Images", height=190)
            hand_over_names(files)
            prompt = prompt_box("What the images should show. Without it: quality alone")
            by = gr.Radio(
                [(title_of(task), task) for task in tasks], value=tasks[0], label="Rank by", visible=len(tasks) > 1
            )
            button = gr.Button("Score", variant="primary")
        with gr.Column(scale=5, min_width=300):
            found = gr.State(([], ""))
            shown = gr.HTML(EMPTY["score"], js_on_load=None, elem_id="ranking")
    for trigger in (button.click, prompt.submit):
        trigger(answers.score, [files, prompt, by], [found, shown], show_progress_on=shown, **event)
    # In the queue of the model as well: or it would rank what is being scored now by what was there before.
    by.change(answers.rank, [found, by], shown, show_progress="hidden", **event)


def build_look_tab(answers: Answers, event: Mapping[str, Any]) -> None:
    """One image, one prompt, a map for each score."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = gr.Image(sources=["upload"], label="Image", height=260, buttons=[])
            hand_over_names(image)
            prompt = prompt_box("What the image should show. Without it: quality alone")
            grid = gr.Radio([4, 8, 12, 16], value=8, label="Patches per side: finer maps take longer")
            button = gr.Button("Show", variant="primary")
        with gr.Column(scale=5, min_width=300):
            shown = gr.HTML(EMPTY["look"], js_on_load=None, elem_id="maps")
            gr.HTML(LOOK_HELP, js_on_load=None)
    for trigger in (button.click, prompt.submit):
        trigger(answers.look, [image, prompt, grid], shown, **event)


def build_table_tab(answers: Answers, event: Mapping[str, Any]) -> None:
    """A CSV and its images, a CSV of scores."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            sheet = gr.File(file_types=[".csv"], label="CSV: name,prompt", height=130)
            files = gr.File(file_count="multiple", file_types=SUFFIXES, label="Its images", height=190)
            hand_over_names(sheet)
            hand_over_names(files)
            button = gr.Button("Score the table", variant="primary")
            download = gr.DownloadButton("Download as CSV", interactive=False)
        with gr.Column(scale=5, min_width=300):
            shown = gr.HTML(EMPTY["table"], js_on_load=None, elem_id="table")
    button.click(answers.table, [sheet, files], [shown, download], show_progress_on=shown, **event)


def prompt_box(hint: str) -> gr.Textbox:
    """Where a prompt is typed."""
    return gr.Textbox(label="Prompt", placeholder=hint, lines=2, max_lines=4, max_length=MAX_PROMPT, submit_btn=False)


def refuse_downloads() -> None:
    """Let Gradio fetch nothing for a visitor: it would get any public address that a request names."""

    async def refuse(*args: Any, **options: Any) -> None:
        raise ValueError("this page fetches nothing from elsewhere")

    for name in ("get", "async_validate_url"):  # of safehttpx, through which all of it goes
        setattr(gr.processing_utils.sh, name, refuse)


def serve(
    page: gr.Blocks,
    host: str,
    port: int,
    *,
    routes: Sequence[BaseRoute] = (),
    accounts: Mapping[str, str] | None = None,
) -> str:
    """Serve the page in other threads, to this machine alone unless `host` says otherwise. Returns its address.

    Args:
        routes: what is answered beside the page.
        accounts: password by user; the page and its API are for these alone.
    """
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # none that would have to be fetched
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    refuse_downloads()
    # Gradio asks the server whether it is there, which no proxy must come between.
    beside = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")).split(",")
    if beside != ["*"]:
        os.environ["no_proxy"] = ",".join(dict.fromkeys([*filter(None, beside), "127.0.0.1", "localhost", host]))
    _, address, _ = page.launch(
        server_name=f"[{host}]" if ":" in host else host,  # an IPv6 address, as in a link
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"routes": list(routes)},
        auth=list(accounts.items()) if accounts else None,
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=MAX_SESSIONS,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=theme,
        css_paths=STYLE,
    )
    return address
