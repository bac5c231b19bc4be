"""Score images with a trained run: from the command line, or from Python in three lines.

from predict import Scorer
scorer = Scorer.load("runs/demo/best")
print(scorer.score(["a.png", "b.png"], ["a red circle", "a blue square"]))
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch is imported, which takes seconds.
    from commands import parse_predict_args
    from configs import one_line_errors
    from signals import end_as_usual, end_quietly

    end_quietly()
    with one_line_errors():
        parse_predict_args()

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import backbones
import checkpoint
import data
import described
import engine
import evaluation
import inputs
import models
from commands import parse_predict_args
from configs import one_line_errors, split_list
from image_files import read_file
from images import Views, decode, decode_all, first_five, is_missing, leave_folder
from parts import Parts
from scores import TASKS, columns_of

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class LoosePixels:
    """Evaluation views of files or Pillow images, each decoded when it is needed."""

    stage = 0

    def __init__(self, images: Sequence[str | Path | Image.Image], views: Views, num_threads: int) -> None:
        self.images = images
        self.views = views
        self.num_threads = num_threads

    def count(self, view: inputs.View) -> int:
        """How many views of an image are given."""
        return self.views.count(view)

    def prepare(self, rows: inputs.Rows, view: inputs.View) -> list[Tensor]:
        """Decoded images. Raises OSError that counts all images that cannot be read and names the first five."""
        try:
            decoded = decode_all([self.images[row] for row in rows], self.views.decode_size, self.num_threads)
        except OSError as error:
            with ThreadPoolExecutor(max(1, self.num_threads)) as pool:
                problems = [problem for problem in pool.map(self.problem, range(len(self.images))) if problem]
            found = f"{len(problems)} of {len(self.images)} images cannot be read: {first_five(problems)}"
            raise OSError(found if problems else f"an image could not be read at first ({error})") from error
        return [inputs.pinned(image, self.views.device) for image in decoded]

    def problem(self, row: int) -> str:
        """Name of an image that cannot be read, and why; "" for one that can."""
        image = self.images[row]
        name = f"image {row + 1}" if isinstance(image, Image.Image) else str(image)
        try:
            decode(image if isinstance(image, Image.Image) else read_file(image), self.views.decode_size)
        except OSError as error:
            return f"{name} ({error})"
        return ""

    def finish(self, prepared: list[Tensor], rows: inputs.Rows, view: inputs.View) -> Tensor:
        """(B, 3, S, S) normalised pixels; (B, V, 3, S, S) of several views."""
        return self.views(prepared, [], None)


class Scorer:
    """A trained model with all it needs: pixels and prompts in, scores in MOS units out."""

    def __init__(
        self,
        model: models.ScoreModel,
        tokenizer: backbones.Tokenizer,
        description: dict[str, Any],
        *,
        device: str,
        amp: str,
    ) -> None:
        self.runtime = engine.start_runtime(device, amp)
        self.model = model.to(self.runtime.device)
        self.tokenizer = tokenizer
        self.description = description
        self.num_truncated = 0
        self.scales = {task: data.LabelScale(**scale) for task, scale in description["scales"].items()}

    @property
    def has_levels(self) -> bool:
        """Whether the scores start from levels, so that every image needs texts."""
        return getattr(self.model.heads, "temperature", None) is not None

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", amp: str = "off") -> Scorer:
        """Load a checkpoint folder (RUN/best, or RUN itself). Raises ValueError if it is none or is damaged."""
        described.check_checkpoint(Path(path))
        folder, state, description = checkpoint.load_weights(Path(path))
        try:
            backbone = backbones.rebuild(description["clip"], folder, image_size=description["image_size"])
            model = models.build_model(backbone.clip, **description["model"])
            model.load_state_dict(state)
            return cls(model, backbone.tokenizer, description, device=device, amp=amp)
        except described.MISFITS as error:
            raise described.misfit(folder, error) from error

    def score(
        self,
        images: Sequence[str | Path | Image.Image],
        prompts: Sequence[str] | str | None = None,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        progress: Callable[[int], object] | None = None,
        clamp: bool = True,
    ) -> pd.DataFrame:
        """Score images. Under torchrun every process scores what it is given, for itself.

        Args:
            images: paths or PIL images, of any size and mode.
            prompts: one per image, one for all, or None for quality alone. Empty texts count as none. Texts beyond
                CLIP's context length are cut; `num_truncated` holds how many that were.
            num_workers: threads that decode images; None: one per core, at most 16.
            progress: is told the number of images after each batch.
            clamp: keep scores within the scale, as people expect; clamping ties scores that differ.

        Returns:
            One row per image: pred_quality, pred_align and further scores in MOS units, NaN for what the model was
            not trained on or has no prompt for.

        Raises:
            ValueError: the numbers of images and prompts differ, or there is nothing that can be scored.
            OSError: images cannot be read; all are counted, the first five named.
        """
        self.num_truncated = 0
        prompts = "" if prompts is None else prompts
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images):
            raise ValueError(f"{len(images)} images but {len(texts)} prompts: give one for each, one for all, or none")
        columns = {task: columns_of(task)[1] for task in dict.fromkeys([*TASKS, *self.scales])}
        table = pd.DataFrame(np.nan, index=range(len(images)), columns=list(columns.values()))
        if not len(images):
            return table
        has_prompt = np.array([bool(text.strip()) for text in texts])
        if not has_prompt.any() and "q" not in self.scales:
            raise ValueError("this model was trained on consistency alone: give it prompts")
        pixels = self.pixels(images, num_workers)
        feed = inputs.Feed(
            pixels=pixels,
            device=self.runtime.device,
            targets={},
            prompts=self.text_table(texts) if has_prompt.any() or self.has_levels else None,
            num_ahead=self.runtime.num_ahead,
        )
        at_once = max(1, batch_size // pixels.count(None))  # as many views as otherwise images
        order = inputs.BatchOrder(np.arange(len(images)), batch_size=at_once)
        batches = reported(feed.batches(order), progress or (lambda num_images: None))
        alone = replace(self.runtime, rank=0, world=1)
        scores = engine.predict(self.model, batches, models.score_batch, runtime=alone)
        for task, scale in self.scales.items():
            if task in scores:
                mos = scale.to_mos(scores[task])
                table[columns[task]] = scale.clamp(mos) if clamp else mos
        table.loc[~has_prompt, columns["c"]] = np.nan
        return table

    def pixels(self, images: Sequence[str | Path | Image.Image], num_workers: int | None) -> LoosePixels:
        """The source of evaluation views."""
        preprocess = self.description["clip"]["preprocess_cfg"]
        views = Views(
            image_size=self.description["image_size"],
            device=self.runtime.device,
            test_crops=self.description.get("test_crops", 0),
            global_view=self.model.global_view,
            **preprocess,
        )
        return LoosePixels(images, views, self.runtime.num_threads if num_workers is None else num_workers)

    def text_table(self, texts: Sequence[str]) -> inputs.TextTable:
        """The prompts, tokenised, with their levels if the model reads them."""
        trim = models.trims_exactly(self.model.clip.text)
        if self.has_levels:
            return inputs.LevelledTexts(texts, self.tokenize, self.runtime.device, trim=trim, **models.LEVEL_TEXTS)
        return inputs.TextTable(texts, self.tokenize, self.runtime.device, trim=trim)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (P, N) token ids; counts those that had to be cut."""
        tokens, self.num_truncated = backbones.tokenize(self.tokenizer, texts, self.model.clip.context_length)
        return tokens


def reported(batches: Iterator[inputs.Batch], progress: Callable[[int], object]) -> Iterator[inputs.Batch]:
    """The batches, unchanged; tells the size of each once it has been worked on."""
    for batch in batches:
        yield batch
        progress(len(batch))


def names_given(args: argparse.Namespace) -> list[str]:
    """Names of the images that the flags give without a CSV. Raises ValueError for sources that do not exist."""
    if args.image_dir and not Path(args.image_dir).is_dir():
        raise ValueError(f"--image_dir {args.image_dir}: no such folder")
    for path in args.images:
        if is_missing(Path(path)):
            raise ValueError(f"{path}: no such image")
    if not args.image_dir or args.csv:
        return args.images
    return images_in(Path(args.image_dir), follow_links=args.follow_links)


def images_in(folder: Path, *, follow_links: bool = False) -> list[str]:
    """Names of all image files below a folder, sorted.

    Args:
        follow_links: also those behind links that leave the folder; otherwise their number is said.

    Raises:
        ValueError: there are none. OSError: a folder cannot be read.
    """
    found, folders_linked, seen = [], [], set()
    for place, folders, files in os.walk(folder, followlinks=follow_links, onerror=raise_error):
        real = os.path.realpath(place)
        if real in seen:  # links that lead in a circle, or twice to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        folders_linked += [path for name in folders if (path := Path(place, name)).is_symlink()]
        found += [Path(place, name) for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not follow_links:
        leaves = leave_folder(found, folder)
        num_passed = sum(leaves) + sum(leave_folder(folders_linked, folder))
        found = [path for path, outside in zip(found, leaves, strict=True) if not outside]
        if num_passed and int(os.environ.get("RANK", 0)) == 0:
            text = f"note: {num_passed} link(s) that leave {folder} were passed over; --follow_links takes them"
            print(text, file=sys.stderr)
    if not found:
        raise ValueError(f"--image_dir {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    return [path.relative_to(folder).as_posix() for path in sorted(found)]


def raise_error(error: OSError) -> None:
    """Raise an error that `os.walk` would pass over."""
    raise error


def image_folder(args: argparse.Namespace) -> Path:
    """The folder that names are relative to."""
    return Path(args.image_dir or (Path(args.csv).parent if args.csv else ""))


def pieces(args: argparse.Namespace, names: Sequence[str]) -> Iterator[pd.DataFrame]:
    """What to score, `chunk_size` rows at a time: name, prompt ("" for none) and row. Raises ValueError."""
    if args.csv:
        yield from csv_pieces(args)
    for start in range(0, len(names), args.chunk_size):
        some = names[start : start + args.chunk_size]
        yield pd.DataFrame({"name": some, "prompt": args.prompt or "", "row": range(start, start + len(some))})


def csv_pieces(args: argparse.Namespace) -> Iterator[pd.DataFrame]:
    """The CSV's rows that hold any text, read `chunk_size` at a time; row 1 is the header. Raises ValueError."""
    with (
        data.csv_errors(args.csv),
        pd.read_csv(args.csv, chunksize=args.chunk_size, **data.CSV_AS_TEXT) as reader,
    ):
        header = reader.get_chunk(1).fillna("").iloc[0].str.strip().tolist()
        places = column_places(args, header)
        is_empty = True
        for raw in reader:
            cells = raw.fillna("").apply(lambda column: column.str.strip())  # a row that ends early has NaN
            cells = cells[(cells != "").any(axis=1)]
            texts = {key: "" if place is None else cells[place] for key, place in places.items()}
            if len(cells):
                is_empty = False
                yield pd.DataFrame({**texts, "row": cells.index + 1})
        if is_empty:
            raise ValueError(f"{args.csv}: has a header but no rows")


def column_places(args: argparse.Namespace, header: Sequence[str]) -> dict[str, int | None]:
    """Where the CSV has the names and, if at all, the prompts. Raises ValueError."""
    places: dict[str, int | None] = {}
    for key, column in (("name", args.name_column), ("prompt", args.prompt_column)):
        if header.count(column) > 1:
            raise ValueError(f"{args.csv}: the header has {column!r} more than once")
        if column not in header and column != data.Columns.prompt:  # may be absent under its usual name
            found = data.columns_found(header)
            raise ValueError(f"{args.csv}: no column {column!r} among {found}; name yours with --{key}_column")
        places[key] = header.index(column) if column in header else None
    return places


def image_paths(args: argparse.Namespace, piece: pd.DataFrame) -> list[Path]:
    """Paths of a piece's images. Raises ValueError for a CSV's names that are empty, missing or leave the folder."""
    folder = image_folder(args)
    if args.csv:
        repeated = piece["name"].map(Path).duplicated() & (piece["name"] != "")
        data.check_names(piece[~repeated], folder, args.csv, follow_links=args.follow_links)
    return [folder / name for name in piece["name"]]


def describe_job(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What must be the same for scores to go on where they stopped, as JSON values. Raises OSError."""

    def stamp(path: str | Path) -> list[Any]:
        status = Path(path).stat()
        return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]

    return {
        "checkpoint": stamp(checkpoint.weights_folder(Path(args.checkpoint)) / checkpoint.WEIGHTS_FILE),
        "csv": stamp(args.csv) if args.csv else None,
        "columns": [args.name_column, args.prompt_column],
        "image_dir": str(image_folder(args).resolve()),
        "images": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "prompt": args.prompt or "",
        "chunk_size": args.chunk_size,
    }


def score_piece(
    scorer: Scorer, args: argparse.Namespace, piece: pd.DataFrame, progress: Callable[[int], object] | None = None
) -> pd.DataFrame:
    """name, pred_quality, pred_align. Raises ValueError, OSError."""
    scores = scorer.score(
        image_paths(args, piece),
        piece["prompt"].tolist(),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=progress,
    )
    scores.insert(0, "name", piece["name"].to_numpy())
    return scores


def score_share(
    scorer: Scorer, args: argparse.Namespace, names: Sequence[str], parts: Parts, done: Collection[int]
) -> tuple[int, int, int]:
    """Score the pieces that are not done, of which process r of K takes number r, r + K, ...; each becomes a part.

    Returns:
        How many pieces and rows there are in all, and how many prompts this process cut.

    Raises:
        ValueError: the CSV or an image cannot be used.
    """
    runtime = scorer.runtime
    num_pieces = num_rows = num_cut = 0
    turns = cycle(range(runtime.world))
    with tqdm(unit="img", leave=False, disable=runtime.hide_progress) as bar:
        for number, piece in enumerate(pieces(args, names)):
            num_pieces += 1
            num_rows += len(piece)
            if number in done or next(turns) != runtime.rank:
                continue
            try:
                scores = score_piece(scorer, args, piece, bar.update)
            except (ValueError, OSError) as error:
                kept = "; the scores so far are kept, the same command goes on from there" if parts.finished() else ""
                raise ValueError(f"{error}{kept}") from error
            parts.write(number, scores)
            num_cut += scorer.num_truncated
    return num_pieces, num_rows, num_cut


def write_scores(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Score piece by piece, each process its share, and join the pieces into --out. Raises ValueError, OSError."""
    if args.csv and not Path(args.csv).is_file():
        raise ValueError(f"{args.csv}: no such file")
    scorer = Scorer.load(args.checkpoint, device=args.device)
    runtime = scorer.runtime
    parts = Parts(Path(args.out), describe_job(args, names))
    with parts.alone() if runtime.is_main else nullcontext():
        done = set(runtime.of_main(parts.finished))
        if runtime.world > 1:
            if runtime.is_main:
                parts.begin()
            runtime.barrier()
            if not parts.job_file.exists():
                raise ValueError(f"--out {args.out}: processes on other machines have to see the same folder")
        num_before = parts.count_rows() if done and runtime.is_main else 0
        if done:
            runtime.say(f"going on: {num_before} rows were scored before")
        start = time.monotonic()
        num_pieces, num_rows, num_cut = score_share(scorer, args, names, parts, done)
        if runtime.world > 1:
            parts.wait_for(num_pieces)
        num_cut = int(runtime.gather(torch.tensor([num_cut], device=runtime.device), runtime.world).sum())
        if runtime.is_main:
            parts.join(num_pieces)
            note_cut_prompts(num_cut)
            seconds, num_new = time.monotonic() - start, num_rows - num_before
            print(f"{num_new} images scored in {seconds:.0f} s ({num_new / seconds:.0f} per second): {args.out}")


def print_scores(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Score all at once and print the table. Raises ValueError, OSError."""
    table = pd.concat(pieces(args, names), ignore_index=True)
    image_paths(args, table)  # complains before the model is loaded
    scorer = Scorer.load(args.checkpoint, device=args.device)
    scores = score_piece(scorer, args, table)
    note_cut_prompts(scorer.num_truncated)
    print(scores.dropna(axis=1, how="all").to_string(index=False, float_format="%.4f"))


def evaluate(args: argparse.Namespace) -> pd.DataFrame:
    """Score every labelled set with every run; print and return the table. Raises ValueError, OSError."""
    columns = data.Columns(
        name=args.name_column,
        prompt=args.prompt_column,
        quality=args.quality_column,
        consistency=args.consistency_column,
        group=args.group_column,
    )
    scorers = {run: Scorer.load(run, device=args.device) for run in args.checkpoints}
    extra = sorted({task for scorer in scorers.values() for task in scorer.scales} - set(TASKS))
    named = list(zip(split_list(args.dataset), split_list(args.data_root), strict=True))
    folder = image_folder(args)
    sets = evaluation.read_sets(args.csv, folder, columns, named, extra, follow_links=args.follow_links)
    rows = []
    for labelled in sets:
        for run, scorer in scorers.items():
            with tqdm(total=len(labelled.table), unit="img", leave=False, disable=None) as bar:

                def score(table: pd.DataFrame, scorer: Scorer = scorer, bar: tqdm = bar) -> pd.DataFrame:
                    return scorer.score(
                        table["path"].tolist(),
                        table["prompt"].tolist(),
                        batch_size=args.batch_size,
                        num_workers=args.num_workers,
                        progress=bar.update,
                        clamp=False,
                    )

                found, lines = evaluation.evaluate(run, list(scorer.scales), labelled, score)
            print(f"{run} on {labelled.title}:", *lines, "", sep="\n")
            note_cut_prompts(scorer.num_truncated)
            rows += found
    if not rows:
        raise ValueError("--evaluate: there is nothing to score")
    print("\n".join(evaluation.table_lines(rows)))
    table = pd.DataFrame(rows, columns=evaluation.COLUMNS)
    if args.out:
        checkpoint.write_csv(Path(args.out), table)
    return table


def note_cut_prompts(number: int) -> None:
    """Say how many prompts were cut, if any."""
    if number:
        print(f"note: {number} prompt(s) exceed CLIP's context length and were cut", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Score what the command line names; print the table, or write it to --out."""
    with one_line_errors():
        args = parse_predict_args(argv)
        if args.evaluate:
            evaluate(args)
            return
        names = names_given(args)
        if args.out:
            write_scores(args, names)
        else:
            print_scores(args, names)
        engine.stop_runtime()


if __name__ == "__main__":
    end_as_usual()
    main(sys.argv[1:])
