"""The page of one run folder, or of a folder of repeated runs."""

from __future__ import annotations

from pathlib import Path

from evaluation import summaries
from pages import figures
from pages.elements import FIGURES_DIR, Pictures, write_page, write_pictures
from pages.repeated_page import repeated_content
from pages.run_data import REPORT_FILE, read_run
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
    is_repeated = (folder / summaries.PROTOCOL_FILE).exists()
    with figures.style():
        content = repeated_content(folder, pictures) if is_repeated else run_content(read_run(folder), pictures)
        template = "repeated.html.j2" if is_repeated else "report.html.j2"
        write_pictures(folder / FIGURES_DIR, pictures.drawn)
        write_page(folder / REPORT_FILE, template, title=folder.resolve().name, **content)  # last: who has it has all
    return folder / REPORT_FILE
