"""Scoring many images: a table or a folder, piece by piece, over several processes, and gone on with if stopped."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from cli.options import split_list
from evaluation import cross_dataset
from serving.scorer import Scorer
from sources import csv_files
from sources.image_names import check_image_names
from sources.scores import TASKS
from storage import tables
from storage.chunks import Chunks
from storage.image_files import SUFFIXES, is_missing, leaves_folder
from storage.messages import note
from storage.plain_files import csv_form
from training import checkpoints


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
        found += [Path(place, name) for name in files if Path(name).suffix.lower() in SUFFIXES]
    if not follow_links:
        leaves = leaves_folder(found, folder)
        num_passed = sum(leaves) + sum(leaves_folder(folders_linked, folder))
        found = [path for path, outside in zip(found, leaves, strict=True) if not outside]
        if num_passed:
            note(f"{num_passed} link(s) that leave {folder} were passed over; --follow_links takes them")
    if not found:
        raise ValueError(f"--image_dir {folder}: no images ({', '.join(sorted(SUFFIXES))}) in it")
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
    with csv_files.csv_errors(args.csv):
        form = csv_form(args.csv, [args.name_column, args.prompt_column])
    with (
        csv_files.csv_errors(args.csv),
        pd.read_csv(args.csv, chunksize=args.chunk_size, **tables.as_text(form)) as reader,
    ):
        places = column_places(args, form.header)
        tables.say_form(args.csv, form, note)
        reader.get_chunk(1)  # the header
        is_empty = True
        for raw in reader:
            raw = tables.check_width(raw.fillna(""), form)  # a row that ends early has NaN
            cells = raw.apply(lambda column: column.str.strip())
            cells = cells[(cells != "").any(axis=1)]
            texts = {key: "" if place is None else cells[place] for key, place in places.items()}
            if len(cells):
                is_empty = False
                yield pd.DataFrame({**texts, "row": cells.index + 1 + form.num_before})
        if is_empty:
            raise ValueError(f"{args.csv}: has a header but no rows")


def column_places(args: argparse.Namespace, header: Sequence[str]) -> dict[str, int | None]:
    """Where the CSV has the names and, if at all, the prompts. Raises ValueError."""
    places: dict[str, int | None] = {}
    for key, column in (("name", args.name_column), ("prompt", args.prompt_column)):
        if header.count(column) > 1:
            raise ValueError(f"{args.csv}: the header has {column!r} more than once")
        if column not in header and column != csv_files.Columns.prompt:  # may be absent under its usual name
            found = csv_files.columns_found(header)
            raise ValueError(f"{args.csv}: no column {column!r} among {found}; name yours with --{key}_column")
        places[key] = header.index(column) if column in header else None
    return places


def image_paths(args: argparse.Namespace, piece: pd.DataFrame, say: tables.Say = note) -> list[Path]:
    """Paths of a piece's images. Raises ValueError for a CSV's names that are empty, missing or leave the folder."""
    folder = image_folder(args)
    if args.csv:
        return check_image_names(piece, folder, args.csv, follow_links=args.follow_links, may_repeat=True, say=say)
    return [folder / name for name in piece["name"]]


def describe_job(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What must be the same for scores to go on where they stopped, as JSON values. Raises OSError."""

    def stamp(path: str | Path) -> list[Any]:
        status = Path(path).stat()
        return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]

    return {
        "checkpoint": stamp(checkpoints.weights_folder(Path(args.checkpoint)) / checkpoints.WEIGHTS_FILE),
        "csv": stamp(args.csv) if args.csv else None,
        "columns": [args.name_column, args.prompt_column],
        "image_dir": str(image_folder(args).resolve()),
        "images": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "prompt": args.prompt or "",
        "chunk_size": args.chunk_size,
        "amp": args.amp,
    }


def load_scorer(args: argparse.Namespace, names: Sequence[str]) -> Scorer:
    """The scorer of --checkpoint. Raises ValueError, also if it needs prompts and none is given at all."""
    scorer = Scorer.load(args.checkpoint, device=args.device, amp=args.amp)
    if "q" not in scorer.scales and not any((piece["prompt"].str.strip() != "").any() for piece in pieces(args, names)):
        scorer.texts(1, [""])
    return scorer


def score_piece(
    scorer: Scorer, args: argparse.Namespace, piece: pd.DataFrame, progress: Callable[[int], object] | None = None
) -> pd.DataFrame:
    """name, pred_quality, pred_align; an image is scored with a prompt once. Raises ValueError, OSError."""
    keys = ["name", "prompt"]
    pairs = piece.drop_duplicates(keys, ignore_index=True)
    scores = scorer.score_texts(
        image_paths(args, pairs),
        pairs["prompt"].tolist(),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=progress,
    )
    if progress:
        progress(len(piece) - len(pairs))
    return piece[keys].merge(pairs[keys].join(scores), on=keys, how="left").drop(columns="prompt")


def score_share(
    scorer: Scorer,
    args: argparse.Namespace,
    names: Sequence[str],
    parts: Chunks,
    done: Collection[int],
    is_own: Callable[[int], bool] | None = None,
) -> tuple[int, int, int]:
    """Score this process's share of the pieces that are not done; each becomes a part.

    Args:
        is_own: number of a piece -> whether it is of the share; without it, process r of K takes r, r + K, ... of those
            that are not done.

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
            if number in done or not (is_own(number) if is_own else next(turns) == runtime.rank):
                continue
            try:
                scores = score_piece(scorer, args, piece, bar.update)
            except (ValueError, OSError) as error:
                kept = "; the scores so far are kept, the same command goes on from there" if parts.finished() else ""
                raise ValueError(f"{error}{kept}") from error
            parts.write(number, scores)
            num_cut += scorer.num_truncated
    return num_pieces, num_rows, num_cut


def open_parts(args: argparse.Namespace, names: Sequence[str]) -> Chunks:
    """Where the scores of pieces are kept until they are joined. Raises ValueError, OSError."""
    if args.csv and not Path(args.csv).is_file():
        raise ValueError(f"{args.csv}: no such file")
    checkpoints.load_description(Path(args.checkpoint))
    return Chunks(Path(args.out), describe_job(args, names))


def write_shard(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Score the pieces of one shard; those of all lie in one folder until `join_shards`. Raises ValueError, OSError."""
    parts, (shard, count) = open_parts(args, names), args.shard
    parts.check()
    scorer = load_scorer(args, names)
    parts.begin()
    done, start = set(parts.finished()), time.monotonic()
    num_pieces, _, num_cut = score_share(scorer, args, names, parts, done, lambda number: number % count == shard - 1)
    note_cut_prompts(num_cut)
    own = range(shard - 1, num_pieces, count)
    num_new, seconds = len(set(own) - done), time.monotonic() - start
    print(f"shard {shard} of {count}: {num_new} of its {len(own)} pieces scored in {seconds:.0f} s, all are there now")


def join_shards(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Write --out from the pieces that shards have scored. Raises ValueError if any is missing, OSError."""
    parts = open_parts(args, names)
    with parts.alone():
        sizes = [len(piece) for piece in pieces(args, names)]
        missing = sorted(set(range(len(sizes))) - set(parts.finished()))
        if missing:
            raise ValueError(
                f"--join: {len(missing)} of {len(sizes)} pieces are missing, such as number {missing[0] + 1}; run "
                "their shards again, or this command without --join, which scores them"
            )
        parts.join(len(sizes))
    print(f"{sum(sizes)} rows joined: {args.out}")


def write_scores(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Score piece by piece, each process its share, and join the pieces into --out. Raises ValueError, OSError."""
    parts = open_parts(args, names)
    scorer = load_scorer(args, names)
    runtime = scorer.runtime
    parts.job = {**parts.job, "amp": runtime.precision}  # what auto is here
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
            print(f"{num_new} rows scored in {seconds:.0f} s ({num_new / seconds:.0f} per second): {args.out}")


def print_scores(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Score all at once and print the table. Raises ValueError, OSError."""
    table = pd.concat(pieces(args, names), ignore_index=True)
    image_paths(args, table, lambda text: None)  # complains before the model is loaded
    scorer = load_scorer(args, names)
    scores = score_piece(scorer, args, table)
    note_cut_prompts(scorer.num_truncated)
    print(scores.dropna(axis=1, how="all").to_string(index=False, float_format="%.4f"))


def evaluate(args: argparse.Namespace) -> pd.DataFrame:
    """Score every labelled set with every run; print and return the table. Raises ValueError, OSError."""
    columns = csv_files.Columns.from_options(args)
    scorers = {run: Scorer.load(run, device=args.device, amp=args.amp) for run in args.checkpoints}
    extra = sorted({task for scorer in scorers.values() for task in scorer.scales} - set(TASKS))
    named = list(zip(split_list(args.dataset), split_list(args.data_root), strict=True))
    folder = image_folder(args)
    rules: dict[str, Any] = {"follow_links": args.follow_links, "duplicates": args.duplicates}
    sets = cross_dataset.read_sets(args.csv, folder, columns, named, extra, **rules)
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

                found, lines = cross_dataset.evaluate(run, list(scorer.scales), labelled, score)
            print(f"{run} on {labelled.title}:", *lines, "", sep="\n")
            note_cut_prompts(scorer.num_truncated)
            rows += found
    if not rows:
        raise ValueError("--evaluate: there is nothing to score")
    print("\n".join(cross_dataset.table_lines(rows)))
    table = pd.DataFrame(rows, columns=cross_dataset.COLUMNS)
    if args.out:
        tables.write_csv(Path(args.out), table)
    return table


def note_cut_prompts(number: int) -> None:
    """Say how many prompts were cut, if any."""
    if number:
        print(f"note: {number} prompt(s) exceed CLIP's context length and were cut", file=sys.stderr)
