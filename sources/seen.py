"""Which images a run has seen, and the runs it started from: what may not be measured on."""

from __future__ import annotations

from pathlib import Path

from sources import examples
from storage import tables
from storage.json_files import read_json
from storage.messages import quoted
from training import checkpoints, run_folder


def seen_by(run: Path) -> set[str] | None:
    """Digests of the images that a run and those it started from were trained or selected on.

    None if a folder does not tell.
    """
    seen: set[str] = set()
    folders: set[Path] = set()
    while True:
        folder = checkpoints.weights_folder(run).parent
        if folder.resolve() in folders:  # runs that name each other
            return seen
        folders.add(folder.resolve())
        try:
            table = tables.read_csv(folder / "splits.csv", dtype=str, keep_default_na=False)
            config = read_json(folder / run_folder.CONFIG_FILE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not {"digest", "split"} <= set(table.columns):
            return None
        seen |= set(table["digest"][table["split"] != "test"])
        first = config.get("init_from")
        if not first:
            return seen
        if not isinstance(first, str):
            raise ValueError(f"{folder / run_folder.CONFIG_FILE}: init_from is {quoted(repr(first))}, must be a text")
        run = Path(first)


def prompts_seen_by(run: Path) -> set[str]:
    """Prompts of the images that a run was trained or selected on, as `examples.prompt_keys` writes them."""
    path = checkpoints.weights_folder(run).parent / "predictions.csv"
    if not path.is_file():
        return set()
    table = tables.read_csv(path, dtype=str, keep_default_na=False)
    if not {"prompt", "split"} <= set(table.columns):
        return set()
    return set(examples.prompt_keys(table[table["split"] != "test"])) - {""}
