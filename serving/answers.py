"""What the page in the browser answers: scores, maps and tables as text and HTML, without any of its layout."""

from __future__ import annotations

import asyncio
import base64
import html
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from inputs.decoding import load_image
from serving import explain
from serving.shared_scorer import SharedScorer
from sources import csv_files, examples
from sources.scores import columns_of, title_of
from storage import tables
from storage.image_files import opened, read_file
from storage.json_files import read_json
from storage.messages import first_five
from training import checkpoints, run_folder

PROGRESS = gr.Progress()  # as a default value it tells Gradio to show progress
EMPTY = {
    "score": '<div class="empty">The images appear here, the highest score first.</div>',
    "look": '<div class="empty">The image appears here with a map for each score.</div>',
    "table": '<div class="empty">The scored rows appear here, and can be downloaded.</div>',
}

SUFFIXES = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
MAX_FILE_SIZE = "100mb"
MAX_IMAGES = 500  # at once; more are for predict.py
MAX_PROMPT = 2000  # characters
MAX_WAITING = 64  # requests for one image that are worked on or wait for that; more are refused
MAX_WAITING_PIXELS = 250_000_000  # of their decoded images together, a gigabyte
MOST_DECODED = 4  # at once, as a file of --max_pixels takes 200 MB before it is made smaller
MAX_SHEET = 4 * 2**20  # bytes of a CSV, which is room for prompts of that length
MAX_ROWS_SHOWN = 100
THUMB_SIDE, PICTURE_SIDE = 160, 720  # pixels of what the page shows


class Busy(Exception):
    """As many requests are waiting as may wait; the text says so to whoever asks."""


class Upload(NamedTuple):
    """A file that somebody has uploaded: what it was called there, which is any text, and where it lies here."""

    name: str
    path: Path


@dataclass(frozen=True)
class TestFold:
    """How well the model's scores agreed with people's on its test fold; nothing known if there are no images."""

    num_images: int = 0
    measures: Mapping[str, float] | None = None

    def of(self, task: str) -> tuple[float, float] | None:
        """SROCC and RMSE (MOS units, after the logistic fit) of a score, if both are known."""
        found = [(self.measures or {}).get(f"{name}_{task}") for name in ("srocc", "rmse")]
        return (float(found[0]), float(found[1])) if found[0] is not None and found[1] is not None else None


NO_TEST_FOLD: TestFold = TestFold()


@dataclass(frozen=True)
class Scored:
    """A scored image, ready to be shown; scores in MOS units by task."""

    name: str
    prompt: str
    thumb: str
    scores: Mapping[str, float]


def read_test_fold(path: Path) -> TestFold:
    """What the run folder of a checkpoint says of its test fold. Raises ValueError for a damaged results.json."""
    folder = checkpoints.weights_folder(path).resolve()
    file = folder.parent / run_folder.RESULTS_FILE
    if folder.name != checkpoints.BEST_DIR or not file.exists():
        return TestFold()
    results = read_json(file)
    try:
        measures = {name: float(value) for name, value in dict(results["test"]).items() if value is not None}
        return TestFold(int(results["images"]["test"]), measures)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None


def checked_image(name: str, source: Path | BinaryIO, max_pixels: int, side: int | None) -> Image.Image:
    """The upright RGB image of a file, decoded for views of `side` pixels, see `decoding.load_image`.

    The header is read first; what it promises too much of is never decoded.

    Raises:
        ValueError: it cannot be read, see `image_files.opened`, or is too large; `name` stands in front.
    """
    try:
        content = read_file(source) if isinstance(source, Path) else source.read()
        with opened(content) as header:
            width, height = header.size
        if width * height > max_pixels:
            raise OSError(f"{width} x {height} are more than {max_pixels / 1e6:g} million pixels")
        return load_image(content, side)
    except OSError as error:
        raise ValueError(f"{name} ({error})") from None


def small_image(upload: Upload, max_pixels: int, side: int) -> Image.Image:
    """The image of an upload, at most `side` pixels wide and high. Raises ValueError, see `checked_image`."""
    image = checked_image(upload.name, upload.path, max_pixels, side)
    image.thumbnail((side, side))
    return image


def as_link(image: Image.Image) -> str:
    """An image as a data: link, so that showing it asks for no file."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def messages(uploads: Iterable[Upload] = ()) -> Iterator[None]:
    """Turn a user's mistake into a message on the page, with the uploads' own names for their places here."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        for upload in uploads:
            text = text.replace(str(upload.path), upload.name)
        # Gradio shows the message as HTML.
        raise gr.Error(html.escape(text), duration=None, title="That did not work", print_exception=False) from error


def on_scale(value: float, scale: examples.LabelScale) -> str:
    """A score in words: "3.92 of 1 to 5: 73 % of the way up"."""
    share = (value - scale.low) / (scale.high - scale.low)
    return f"{value:.2f} of {scale.low:g} to {scale.high:g}: {share:.0%} of the way up".replace("%", " %")


def score_html(value: float, scale: examples.LabelScale, usual: float | None) -> str:
    """A score, in words and as a tick on its scale; `usual`, how far it usually lies from people's, as a band."""
    if np.isnan(value):
        return '<span class="none">none without a prompt</span>'
    span = scale.high - scale.low
    place = 100 * (value - scale.low) / span
    band = ""
    if usual is not None:
        left, right = max(place - 100 * usual / span, 0), min(place + 100 * usual / span, 100)
        band = f'<i class="band" style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
    number, words = on_scale(value, scale).split(" ", 1)
    return (
        f'<div class="number"><b>{number}</b> <span>{words}</span></div>'
        f'<div class="scale">{band}<i class="tick" style="left:{place:.1f}%"></i></div>'
    )


def note_html(*notes: str) -> str:
    """Notes under one another, escaped; nothing without any."""
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes if note)


def cut_note(prompts: Collection[str]) -> str:
    """Says how many prompts were longer than the model reads, if any were."""
    return f"{len(prompts)} prompt(s) are longer than the model reads; the end was left out." if prompts else ""


class Answers:
    """What the page's buttons answer, as HTML. Everything that came from outside is escaped here."""

    def __init__(self, scorer: SharedScorer, test: TestFold, folder: Path, max_pixels: int) -> None:
        """`folder`: where tables to download are put; the caller deletes it."""
        self.scorer = scorer
        self.test = test
        self.folder = folder
        self.max_pixels = max_pixels
        self.num_waiting = 0  # changed in the server's event loop alone, as is the next
        self.pixels_waiting = 0
        self.decoding = asyncio.Semaphore(MOST_DECODED)
        self.left: dict[str, threading.Event] = {}  # by session, while something is computed for it: its page is gone

    @property
    def has_room(self) -> bool:
        """Whether one more request for one image is taken now."""
        return self.num_waiting < MAX_WAITING

    def check_room(self) -> None:
        """Raise Busy if it is not."""
        if not self.has_room:
            raise Busy(f"busy: {MAX_WAITING} requests are waiting already; try again in a moment")

    async def score_one(self, name: str, source: Path | BinaryIO, prompt: str) -> dict[str, Any]:
        """Scores of one image, scored together with what others ask for meanwhile.

        Returns:
            MOS units by column, as in tables, None for what needs a prompt; "prompt_cut": more than the model reads.

        Raises:
            ValueError: the image or the prompt cannot be used. Busy: too many requests are waiting.
        """
        text = prompt.strip()
        if len(text) > MAX_PROMPT:
            raise ValueError(f"the prompt has more than {MAX_PROMPT} characters")
        self.check_room()
        self.num_waiting += 1
        size = 0
        try:
            side = self.scorer.views().decode_size
            async with self.decoding:
                image = await asyncio.to_thread(checked_image, name, source, self.max_pixels, side)
            if self.pixels_waiting + image.width * image.height > MAX_WAITING_PIXELS:
                raise Busy("busy: many large images are waiting already; try again in a moment")
            size = image.width * image.height
            self.pixels_waiting += size
            answer = await asyncio.wrap_future(self.scorer.ask(image, text))
        finally:
            self.num_waiting -= 1
            self.pixels_waiting -= size
        row = self.scorer.clamped(answer.table).iloc[0]
        columns = [columns_of(task)[1] for task in self.scorer.scales]
        scores = {column: None if np.isnan(row[column]) else float(row[column]) for column in columns}
        return {**scores, "prompt_cut": text in answer.cut}

    async def score_upload(self, image: Sequence[Upload], prompt: str | None = None) -> dict[str, Any]:
        """As `score_one`, for Gradio's clients, who see the names of the arguments."""
        try:
            if not image:
                raise ValueError("no image was given")
            return await self.score_one(*image[0], prompt or "")
        except (ValueError, Busy) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def leave(self, request: gr.Request) -> None:
        """End what is computed for a visitor who has closed the page."""
        if left := self.left.get(str(request.session_hash)):
            left.set()

    @contextmanager
    def steps(
        self, request: gr.Request | None, progress: gr.Progress, total: int, unit: str
    ) -> Iterator[Callable[[int], None]]:
        """Gives what is to be told of each step done: the visitor sees it, and the job ends when the page is closed."""
        session, done = str(request and request.session_hash), 0
        left = self.left[session] = threading.Event()

        def count(number: int) -> None:
            nonlocal done
            done += number
            if left.is_set():
                raise ValueError("the page was closed")
            progress((done, total), unit=unit)

        try:
            yield count
        finally:
            del self.left[session]

    def usual(self, task: str) -> float | None:
        """How far a score usually lies from people's, in MOS units, if that is known."""
        known = self.test.of(task)
        return known[1] if known else None

    def read(self, uploads: Sequence[Upload]) -> list[Image.Image | str]:
        """Small images, or what is wrong with them. Raises ValueError for too many."""
        if len(uploads) > MAX_IMAGES:
            raise ValueError(f"{len(uploads)} images at once, at most {MAX_IMAGES}; predict.py scores any number")

        def one(upload: Upload) -> Image.Image | str:
            try:
                return small_image(upload, self.max_pixels, THUMB_SIDE)
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(max(1, self.scorer.runtime.num_threads)) as pool:
            return list(pool.map(one, uploads))

    def score_all(
        self,
        uploads: Sequence[Upload],
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        progress: gr.Progress,
        request: gr.Request | None,
    ) -> tuple[list[Scored], str]:
        """Score checked uploads; also says which prompts were too long. Raises ValueError, OSError."""
        paths = [upload.path for upload in uploads]
        with self.steps(request, progress, len(uploads), "images") as count:
            table, cut = self.scorer.answer(paths, prompts, count)
        columns = {task: table[columns_of(task)[1]].tolist() for task in self.scorer.scales}
        rows = [
            Scored(upload.name, prompt, as_link(image), {task: columns[task][row] for task in columns})
            for row, (upload, image, prompt) in enumerate(zip(uploads, images, prompts, strict=True))
        ]
        return rows, cut_note(cut)

    def score(
        self,
        uploads: Sequence[Upload],
        prompt: str | None,
        by: str,
        progress: gr.Progress = PROGRESS,
        request: gr.Request | None = None,
    ) -> tuple[tuple[list[Scored], str], str]:
        """Score images with one prompt: what `rank` shows, and that ranking by a score."""
        with messages(uploads):
            if not uploads:
                raise ValueError("no image yet: drop one or several above")
            images = self.read(uploads)
            good = [
                (upload, image) for upload, image in zip(uploads, images, strict=True) if not isinstance(image, str)
            ]
            broken = [image for image in images if isinstance(image, str)]
            left_out = f"{len(broken)} of {len(images)} images cannot be read: {first_five(broken)}" if broken else ""
            if not good:
                raise ValueError(left_out)
            text = (prompt or "").strip()[:MAX_PROMPT]
            uploads, thumbs = zip(*good, strict=True)
            rows, cut = self.score_all(uploads, thumbs, [text] * len(uploads), progress, request)
            found = (rows, note_html(left_out, cut))
            return found, self.rank(found, by)

    def rank(self, found: tuple[list[Scored], str], by: str) -> str:
        """Scored images as a table, the best by one score first; by the first score that is known without that one.

        Args:
            found: the images, and notes that stand above them.
        """
        rows, notes = found
        if not rows:
            return EMPTY["score"]
        known = [task for task in self.scorer.scales if not np.isnan(rows[0].scores[task])]
        used = by if by in known else known[0]
        note = "" if used == by else f"There is no {title_of(by)} without a prompt: ranked by {title_of(used)}."
        ranked = sorted(rows, key=lambda row: row.scores[used], reverse=True)
        return notes + note_html(note) + self.table_html(ranked, known)

    def table_html(self, rows: Sequence[Scored], tasks: Sequence[str], *, with_prompt: bool = False) -> str:
        """Scored images as a table in the order given."""
        cells = []
        for number, row in enumerate(rows, start=1):
            said = f'<div class="prompt">{html.escape(row.prompt)}</div>' if with_prompt and row.prompt else ""
            scores = "".join(
                f'<td data-title="{html.escape(title_of(task))}">'
                f"{score_html(row.scores[task], self.scorer.scales[task], self.usual(task))}</td>"
                for task in tasks
            )
            cells.append(
                f'<tr><td class="rank">{number}</td><td class="thumb"><img src="{row.thumb}" alt=""></td>'
                f'<td class="name">{html.escape(row.name)}{said}</td>{scores}</tr>'
            )
        titles = "".join(f"<th>{html.escape(title_of(task))}</th>" for task in tasks)
        return (
            f'<table class="scores"><thead><tr><th></th><th></th><th>image</th>{titles}</tr></thead>'
            f"<tbody>{''.join(cells)}</tbody></table>"
        )

    def look(
        self,
        uploads: Sequence[Upload],
        prompt: str | None,
        grid: int,
        progress: gr.Progress = PROGRESS,
        request: gr.Request | None = None,
    ) -> str:
        """Heat maps of one image, a figure for each score."""
        with messages(uploads):
            if not uploads:
                raise ValueError("no image yet: drop one above")
            text = (prompt or "").strip()[:MAX_PROMPT]
            picture = small_image(uploads[0], self.max_pixels, PICTURE_SIDE)
            path = uploads[0].path
            with self.steps(request, progress, grid * grid + 1, "looks") as count:
                maps = explain.occlusion_map(self.scorer, path, text, grid, progress=count)
            table, cut = self.scorer.answer([path], text)
            scores = table.iloc[0]
            notes = note_html(cut_note(cut))
            figures = (
                self.figure_html(picture, task, values, float(scores[columns_of(task)[1]]))
                for task, values in maps.items()
            )
            return f'{notes}<div class="maps">{"".join(figures)}</div>'

    def figure_html(self, picture: Image.Image, task: str, values: np.ndarray, score: float) -> str:
        """One map over the picture, with its scale and its strongest patch in words."""
        scale = self.scorer.scales[task]
        # Below a thousandth of the scale there is nothing to see, and colours should not make it look like much.
        limit = max(float(np.abs(values).max()), (scale.high - scale.low) / 1000)
        shown = explain.overlay(picture, values, explain.seen_box(self.scorer, picture.size), limit)
        title = html.escape(title_of(task))
        row, column = np.unravel_index(np.abs(values).argmax(), values.shape)
        change = values[row, column]
        words = f"{'lowers' if change > 0 else 'raises'} it by {abs(change):.2f}"
        return (
            f"<figure><figcaption><h3>{title}</h3><div>{on_scale(score, scale)}</div></figcaption>"
            f'<img src="{as_link(shown)}" alt="heat map of {title}">'
            f'<div class="legend"><span>&minus;{limit:.2f}<br>lowers it</span><i></i>'
            f"<span>+{limit:.2f}<br>raises it</span></div>"
            f"<p>Covering the patch in row {row + 1}, column {column + 1} {words}: the largest change.</p></figure>"
        )

    def table(
        self,
        sheets: Sequence[Upload],
        uploads: Sequence[Upload],
        progress: gr.Progress = PROGRESS,
        request: gr.Request | None = None,
    ) -> tuple[str, Any]:
        """Score the rows of a CSV: the table, and a download of it."""
        with messages([*sheets, *uploads]):
            if not sheets or not uploads:
                raise ValueError("a CSV and its images are both needed")
            names, prompts, notes = read_rows(sheets[0])
            place = match(names, uploads)
            used = sorted(set(place))
            images = dict(zip(used, self.read([uploads[number] for number in used]), strict=True))
            broken = [image for image in images.values() if isinstance(image, str)]
            if broken:
                raise ValueError(f"{len(broken)} of {len(used)} images cannot be read: {first_five(broken)}")
            spare = [upload.name for number, upload in enumerate(uploads) if number not in images]
            if spare:
                notes.append(f"{len(spare)} image(s) without a row were not scored: {first_five(spare)}")
            thumbs = [image for number in place if isinstance(image := images[number], Image.Image)]
            named = [Upload(name, uploads[number].path) for name, number in zip(names, place, strict=True)]
            rows, cut = self.score_all(named, thumbs, prompts, progress, request)
            if len(rows) > MAX_ROWS_SHOWN:
                notes.append(f"The first {MAX_ROWS_SHOWN} of {len(rows)} rows are shown; the file has them all.")
            shown = note_html(*notes, cut) + self.table_html(
                rows[:MAX_ROWS_SHOWN], list(self.scorer.scales), with_prompt=True
            )
            return shown, gr.DownloadButton(value=self.write(rows), interactive=True)

    def write(self, rows: Sequence[Scored]) -> str:
        """The CSV to download: name, prompt and a column for each score. Returns its path."""
        table = pd.DataFrame({"name": [row.name for row in rows], "prompt": [row.prompt for row in rows]})
        for task in self.scorer.scales:
            table[columns_of(task)[1]] = [row.scores[task] for row in rows]
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "scores.csv"
        tables.write_csv(path, table)
        return str(path)

    def about_html(self) -> str:
        """What the scores mean, in words that the checkpoint and its run can vouch for."""
        lines = []
        for task, scale in self.scorer.scales.items():
            title = f"<b>{html.escape(title_of(task))}</b>"
            line = f"{title}: {scale.low:g} to {scale.high:g}, the scale of the human scores that it learned from."
            if known := self.test.of(task):
                line += (
                    f" On {self.test.num_images} test images its order agreed with people's by an SROCC of "
                    f"{known[0]:.2f} (1 is the same order, 0 is chance), and its scores lay about {known[1]:.2f} from "
                    f"theirs (RMSE after the usual logistic fit): the pale band."
                )
            lines.append(f"<li>{line}</li>")
        return f'<ul class="about">{"".join(lines)}</ul>'


def read_rows(sheet: Upload) -> tuple[list[str], list[str], list[str]]:
    """Names and prompts ("" for none) of a CSV's rows, and what is to be said about it. Raises ValueError."""
    if (size := sheet.path.stat().st_size) > MAX_SHEET:
        raise ValueError(f"{sheet.name}: {size} bytes, at most {MAX_SHEET}; predict.py scores any number")
    told: list[str] = []
    table = csv_files.read_csv(sheet.path, ["name", "prompt"], say=told.append)
    told = [text.replace(str(sheet.path), sheet.name) for text in told]
    table = table.map(tables.unescape)  # it may be one that was downloaded here
    if "name" not in table.columns:
        present = ", ".join(repr(column) for column in table.columns)
        raise ValueError(f"{sheet.name}: no column 'name' among {present}")
    names = table["name"].str.strip()
    empty = names.index[names == ""]
    if len(empty):
        raise ValueError(f"{sheet.name} row {empty[0]}: the image name is empty; {len(empty)} such row(s)")
    if len(table) > MAX_IMAGES:
        raise ValueError(f"{sheet.name}: {len(table)} rows, at most {MAX_IMAGES}; predict.py scores any number")
    if "prompt" in table.columns and (long := table["prompt"].str.len() > MAX_PROMPT).any():
        raise ValueError(f"{sheet.name} row {table.index[long][0]}: the prompt has more than {MAX_PROMPT} characters")
    if "prompt" not in table.columns:
        return names.tolist(), [""] * len(table), [*told, f"{sheet.name} has no column 'prompt'."]
    return names.tolist(), table["prompt"].str.strip().tolist(), told


def match(names: Sequence[str], uploads: Sequence[Upload]) -> list[int]:
    """The upload that each name of a CSV means: the one called so. Folders do not count, uploads have none.

    Raises:
        ValueError: a name has no upload or several, or names differ in their folders alone.
    """

    def bare(name: str) -> str:
        return name.replace("\\", "/").rpartition("/")[2]

    places: dict[str, list[int]] = {}
    for number, upload in enumerate(uploads):
        places.setdefault(bare(upload.name), []).append(number)
    missing = list(dict.fromkeys(name for name in names if bare(name) not in places))
    if missing:
        raise ValueError(f"{len(missing)} image(s) of the CSV were not uploaded: {first_five(missing)}")
    twice = [name for name in dict.fromkeys(map(bare, names)) if len(places[name]) > 1]
    if twice:
        raise ValueError(f"{len(twice)} image name(s) were uploaded more than once: {first_five(twice)}")
    full: dict[str, set[str]] = {}
    for name in names:
        full.setdefault(bare(name), set()).add(name)
    alike = [sorted(found) for found in full.values() if len(found) > 1]
    if alike:
        raise ValueError(f"{' and '.join(alike[0])}: uploads have no folders, so these are the same; rename one")
    return [places[bare(name)][0] for name in names]
