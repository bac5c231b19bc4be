"""The page of one run folder, of either program, or of a folder of repeated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drawing import figures
from multirun import summaries
from pages.answers_page import answers_content, read_answers_run
from pages.elements import FIGURES_DIR, Pictures, write_page, write_pictures
from pages.repeated_page import repeated_content
from pages.run_data import REPORT_FILE, is_of_answers, read_run
from pages.run_page import run_content


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` of a finished run, or of a folder of repeated runs, into it.

    Returns:
        The page.

    Raises:
        ValueError: the folder is neither, or a file in it cannot be read.
    """
    folder = Path(folder)
    pictures = Pictures()
    with figures.style():
        template, content = content_of(folder, pictures)
        write_pictures(folder / FIGURES_DIR, pictures.drawn)
        write_page(folder / REPORT_FILE, template, title=folder.resolve().name, **content)  # last: who has it has all
    return folder / REPORT_FILE


def content_of(folder: Path, pictures: Pictures) -> tuple[str, dict[str, Any]]:
    """The template of a folder's page, and what it shows. Raises ValueError."""
    if (folder / summaries.PROTOCOL_FILE).exists():
        return "repeated.html.j2", repeated_content(folder, pictures)
    if is_of_answers(folder):
        return "answers.html.j2", answers_content(read_answers_run(folder), pictures)
    return "report.html.j2", run_content(read_run(folder), pictures)
