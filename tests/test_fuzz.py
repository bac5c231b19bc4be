"""Whatever a file or a command line holds: it is read, or refused in a line, soon and in little memory.

About 100 cases of each kind; 10,000 with --torture.
"""

from __future__ import annotations

import faulthandler
import io
import json
import shlex
import shutil
import struct
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import csv_text, scored_rows
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import baseline
import models
from cli import errors
from configs import NOT_SAVED, OPTIONS, TrainingConfig
from data import fixed_splits
from guidance import arguments, presets
from inputs import decoding
from multirun import comparison, protocol, summaries
from pages import comparison_page, run_data
from serving import answers, batch_scoring
from sources import csv_files, examples, splits
from sources.seen import prompts_seen_by, seen_by
from storage.tensors import pack, read_tensors, unpack, weight_shapes
from training import checkpoints

pytestmark = pytest.mark.torture
# The profile of --torture asks for more. No case is kept for the next time: examples are what stays.
FUZZ = settings(
    max_examples=max(100, settings().max_examples),
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
PATIENCE = 5.0  # seconds of the processor for a case
HANGS = 60  # seconds, after which the process ends with a traceback: nothing else stops a loop in C
MB = 2**20


def memory(what: str) -> int:
    """Bytes that this process has now ("VmRSS"), or had at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


class Cases:
    """Counts the cases of a test, times what is read of them, and holds it to the promise."""

    def __init__(self, figure: Callable[[str, str], None]) -> None:
        self.figure = figure
        self.num = self.num_reads = self.num_refused = 0
        self.slowest = 0.0
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak of other tests is not ours
        self.before = memory("VmHWM")

    def grown(self) -> int:
        """Bytes that the peak has risen by."""
        return memory("VmHWM") - self.before

    @contextmanager
    def one(self, most_mb: int = 200) -> Iterator[None]:
        """One reading of a case: may be refused, and nothing worse."""
        faulthandler.dump_traceback_later(HANGS, exit=True, file=sys.__stderr__)
        start, before = time.process_time(), self.grown()
        try:
            yield
        except (ValueError, OSError) as error:
            self.num_refused += 1
            check_message(str(error))
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds = time.process_time() - start
        self.num_reads += 1
        self.slowest = max(self.slowest, seconds)
        assert seconds < PATIENCE, f"took {seconds:.1f} s"
        assert self.grown() - before < most_mb * MB, f"took {(self.grown() - before) / MB:.0f} MB"

    def run(self, title: str, test: Callable[[], object]) -> None:
        """Run a Hypothesis test whose body is made of `one`, and tell its figures."""
        start = time.perf_counter()
        test()
        seconds, grown = time.perf_counter() - start, self.grown() / MB
        refused = f"{self.num_refused} of {self.num_reads} readings refused"
        cost = f"{seconds:.0f} s, slowest {self.slowest:.2f} s, peak +{grown:.0f} MB"
        self.figure(f"fuzz: {title}", f"{self.num} cases, 0 crashes, {refused}, {cost}")


def check_message(message: str) -> None:
    assert message.strip(), "an empty message"
    assert "\n" not in errors.printable(message), f"more than a line: {message!r}"
    assert len(message) < 5000, "too long a message"


@pytest.fixture
def cases(figure) -> Cases:
    return Cases(figure)


# -- what is tried

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from(
        [
            0,
            1,
            -1,
            3,
            2**31,
            10**9,
            2**62,
            1e300,
            -0.5,
            1e-300,
            "",
            "x",
            "é\x00\x1b[31m",
            "../x",
            "a\nb",
            "DEEP",
            "DIGITS",
            "NUMBER",
            "HALF",
        ]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "drop", "repeat", "insert", "overwrite", "flip", "flip", "flip", "splice"]),
        st.floats(0, 1),
        st.sampled_from([1, 2, 4, 16, 200]),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=5,
)


def edited(
    content: bytes, edits: Sequence[tuple[str, float, int, int]], tokens: Sequence[bytes], other: bytes
) -> bytes:
    """Content that was damaged: (kind, place as a share of the content, bytes, a number to choose by), ..."""
    for kind, share, size, number in edits:
        at = int(share * len(content))
        token = tokens[number % len(tokens)]
        before, after = content[:at], content[at:]
        content = {
            "cut": before,
            "drop": before + after[size:],
            "repeat": before + after[:size] * (number % 50) + after,
            "insert": before + token + after,
            "overwrite": before + token + after[len(token) :],
            "flip": before + bytes([byte ^ number % 255 + 1 for byte in after[:1]]) + after[1:],
            "splice": before + other[number % (len(other) + 1) :],
        }[kind]
    return content


def damaged(seeds: Sequence[bytes], tokens: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Any bytes, and damaged ones of these."""
    one_of_them = st.sampled_from(seeds)
    return st.binary(max_size=300) | st.builds(
        lambda seed, edits, other: edited(seed, edits, tokens, other), one_of_them, EDITS, one_of_them
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of nested JSON values is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Mapping[str, Any]) -> Any:
    """A JSON object with one to three of its parts, at any depth, replaced, removed or added."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in places(found) if place] or [("x",)]))
        part = found
        for key in path:
            part = part[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if what == "replace" or isinstance(part, list):
            part[last] = draw(JSON)
        elif what == "remove":
            part.pop(last, None)
        else:
            part[draw(st.text(max_size=5))] = part.pop(last, None)
    return found


JSON_TOKENS = [
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"NaN",
    b"1e999",
    b"9" * 30,
    b"[" * 5000,
    b",",
    b":",
]


def spelt(text: str) -> str:
    """JSON with some of its parts being what no writer of JSON writes."""
    for name, odd in (
        ("DEEP", "[" * 5000 + "]" * 5000),
        ("DIGITS", "9" * 5000),
        ("NUMBER", "NaN"),
        ("HALF", '"\\ud800"'),
    ):
        text = text.replace(f'"{name}"', odd)
    return text


def json_files(value: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    """Contents of a JSON file that once held this."""
    text = json.dumps(value).encode()
    return st.one_of(
        damaged([text, text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text], JSON_TOKENS),
        *[changed(value).map(lambda found: spelt(json.dumps(found)).encode())] * 3,
    )


# -- tables

ROWS = scored_rows(4, 2)
CELLS = (
    *(
        "",
        " ",
        "a.png",
        "gen0_0.png",
        "../a.png",
        "/a",
        "a\0b",
        "C:\\a",
        "x" * 300,
        "thing 0",
        "THING  0",
        "train",
        "val",
        "test",
    ),
    *(
        "1",
        "-0",
        "1e308",
        "1e999",
        "nan",
        "inf",
        "1_0",
        "٣",
        "0x1",
        "1,5",
        "=1+1",
        "'=1",
        '"',
        "a\nb",
        "a\rb",
        "\ufeff",
        "\u2028",
    ),
)
CSV_SEEDS = [
    csv_text(ROWS).encode(),
    csv_text([{**row, "split": "train", "reference": "r", "std_quality": 1} for row in ROWS], newline="\r\n").encode(),
    csv_text(ROWS).encode("utf-8-sig"),
    csv_text(ROWS).encode("utf-16"),
    csv_text([{**row, "prompt": 'größer, "é"\n\nx'} for row in ROWS]).encode("cp1252"),
    csv_text([{"name": row["name"], "split": "test"} for row in ROWS]).encode(),
]
CSV_TOKENS = [
    *(
        b"\0",
        b'"',
        b'""',
        b",",
        b"\n",
        b"\r",
        b"\r\n",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\x1a",
        b";",
        b"\t",
        b"\\",
        b"'",
    ),
    *(
        b"," * 2000,
        b"x" * 200_000,
        b'"' * 999,
        b"\n" * 3000,
        b"9" * 5000,
        b"1e999",
        b"nan",
        "é\u2028\x85".encode(),
        b"\0" * 50,
    ),
    *(b"name", b"split", b"mos_quality"),
]
TABLE_COLUMNS = ["name", "prompt", "mos_quality", "mos_align", "explanation", "split", "reference", "std_quality", ""]
TABLES = st.lists(st.sampled_from(TABLE_COLUMNS), min_size=1, max_size=6).flatmap(
    lambda columns: st.lists(
        st.lists(st.sampled_from(CELLS) | st.text(max_size=5), max_size=len(columns) + 1), max_size=6
    ).map(lambda rows: [columns, *rows])
)


def as_csv(rows: Sequence[Sequence[str]]) -> bytes:
    quoted = (",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    return "\n".join(quoted).encode("utf-8", "surrogatepass")


def test_tables(cases, tmp_path):
    path = tmp_path / "a.csv"
    for name in ["a.png", *(row["name"] for row in ROWS)]:
        (tmp_path / name).touch()
    table = pd.DataFrame({"name": [row["name"] for row in ROWS], "row": 1})
    source = examples.LabelledTable(title="a", table=table, ranges={}, labels=b"")
    flags = Namespace(csv=str(path), chunk_size=3, name_column="name", prompt_column="prompt")
    readers: list[Callable[[], object]] = [
        lambda: csv_files.read_table(path, tmp_path, csv_files.Columns(), extra=["x"]),
        lambda: csv_files.read_table(path, tmp_path, csv_files.Columns(), may_be_missing=True),
        lambda: csv_files.read_table(path, tmp_path, csv_files.Columns(), may_be_missing=True, scored=False),
        lambda: fixed_splits([source], path),
        lambda: [
            batch_scoring.image_paths(Namespace(**vars(flags), image_dir="", follow_links=False), piece)
            for piece in batch_scoring.csv_pieces(flags)
        ],
        lambda: comparison.scores_of(tmp_path, comparison.read_predictions(tmp_path)),
        lambda: run_data.read_csv(path, tmp_path, ["name"]),
        lambda: run_data.read_csv(path, tmp_path, ["name"], texts=True),
    ]

    @FUZZ
    @example(b"name\n1\n1,2\n")  # pandas says so in two lines
    @example(b'name\n"a\nb.png"\n')
    @example(b'name,split\n"a\nb.png",train\n')
    @example(b"x" * 5000 + b"\n1\n")
    @example(b"\n1\n")
    @example(b"name,mos_quality\n" + b"x" * 5000 + b",1\n")
    @example(b"name,mos_quality\na.png," + b"x" * 5000 + b"\n")
    @given(damaged(CSV_SEEDS, CSV_TOKENS) | TABLES.map(as_csv))
    def read(content):
        cases.num += 1
        for name in ("a.csv", comparison.PREDICTIONS_FILE):
            (tmp_path / name).write_bytes(content)
        for reader in readers:
            with cases.one():
                reader()

    cases.run("CSV", read)


# -- options


def test_command_lines(cases, tmp_path, capsys):
    words = st.sampled_from(
        [
            *(
                "",
                "-1",
                "0",
                "1",
                "2",
                "5",
                "0.1",
                "0.5",
                "1e-3",
                "1e999",
                "nan",
                "-inf",
                "x",
                "1,2",
                "--",
                "-",
                "tiny",
                "none",
            ),
            *(
                "assets",
                "agiqa-3k",
                "csv,spaq",
                "22@0,20@1",
                "mse+plcc",
                "mse+1e400*l1",
                "auto",
                "skip",
                "prompt",
                "image",
                "é",
                "a b",
                "a\nb",
                "9" * 4400,
            ),
            *("\0", "\udcff", "1_0", "٣", "list", "--lr", str(tmp_path), str(tmp_path / "config.json")),
        ]
    ) | st.text(max_size=6)

    def said(name: str) -> st.SearchStrategy[list[str]]:
        spec = OPTIONS[name]
        if spec.kind is bool:
            return st.sampled_from([[spec.flag], [spec.undo], [spec.flag, "x"]])
        values = st.sampled_from(spec.metadata["choices"] or [str(spec.default)])
        if spec.kind in (int, float):
            values = {int: st.integers(0, 50), float: st.floats(0, 1)}[spec.kind].map(str)
        values = st.one_of(*[values] * 4, words)
        return st.lists(values, min_size=1 + spec.pair, max_size=1 + spec.pair).map(
            lambda found: [f"--{name}", *found]
        ) | values.map(lambda found: [f"--{name}={found}"])

    flags = st.one_of(*[st.sampled_from(sorted(OPTIONS)).flatmap(said)] * 6, st.lists(words, max_size=2))
    options = st.dictionaries(
        st.sampled_from(sorted(OPTIONS)) | st.text(max_size=5), JSON | st.text(max_size=3), max_size=4
    )
    path = tmp_path / "config.json"
    saved = TrainingConfig().to_json()

    @FUZZ
    @example([["a\nb"]], "flags", b"")
    @example([["--config=a\nb"]], "flags", b"")
    @example([["--resume=a\nb"]], "flags", b"")
    @example([["--config=--"]], "flags", b"")
    @example([["--preset", "list"], ["--no_cache"]], "flags", b"")
    @example([["--preset=--"]], "flags", b"")
    @example([["--resume=--"]], "flags", b"")
    @example([], "--config", b'{"device": "a\\nb"}')
    @example([], "--config", b'{"loss": ' + b"[" * 100_000)
    @example([["--loss", "a\nb"]], "flags", b"")
    @example([], "--config", json.dumps({"loss": "x" * 5000}).encode())
    @given(
        st.lists(flags, max_size=4),
        st.sampled_from(["flags", "flags", "--config", "--resume"]),
        json_files(saved) | options.map(lambda found: json.dumps(found).encode()),
    )
    def parse(given_flags, form, content):
        cases.num += 1
        path.write_bytes(content)
        argv = [word for words in given_flags for word in words]
        argv += {"flags": [], "--config": ["--config", str(path)], "--resume": ["--resume", str(tmp_path)]}[form]
        with cases.one():
            try:
                config = arguments.parse_args(argv)
            except SystemExit:
                asked = "--preset=list" in argv or ("--preset", "list") in pairwise(argv)
                assert asked, "only --preset list ends the program"
                return
            again = arguments.parse_args(shlex.split(presets.command_line(config))[2:])
            own = ("data_csv_path", "image_base_dir") if config.demo else ()  # which the demo fills in
            base = TrainingConfig()
            assert again == replace(config, preset=None, **{name: getattr(base, name) for name in (*NOT_SAVED, *own)})

    cases.run("options", parse)
    capsys.readouterr()


# -- splits


SPLITS = ((), examples.FOLDS, ("train", "test"), (*examples.FOLDS, "", "x"))
SHARES = st.floats(0.05, 0.5) | st.floats(0, 1, exclude_min=True, exclude_max=True)


def split_table(seed: int, count: int, num_prompts: int, splits: Sequence[str], kind: str) -> pd.DataFrame:
    """A table of images as it is split: few prompts or many, in odd spelling, some with folds of their own."""
    rng = np.random.default_rng(seed)
    prompts = [f"p{number}" for number in rng.integers(0, num_prompts, count)]
    forms = {"plain": ["{}"], "spelt": ["{}", " {}  ", "P{}", "ß {}", "SS  {}"], "none": ["{}", "{:.0}"]}[kind]
    scores = rng.integers(1, 4, (2, count)).astype(float)
    scores[rng.random(scores.shape) < rng.choice([0, 0, 0.2, 0.9])] = np.nan
    return pd.DataFrame(
        {
            "name": [f"{number}.png" for number in range(count)],
            "prompt": [rng.choice(forms).format(prompt) for prompt in prompts],
            "reference": prompts if rng.random() < 0.5 else "",
            "split": rng.choice(splits, count) if splits else "",
            **dict(zip("qc", scores, strict=True)),
            "row": range(2, count + 2),
        }
    )


SPLIT_TABLES = st.builds(
    split_table,
    st.integers(0, 2**32 - 1),
    st.integers(1, 80),
    st.integers(1, 60),
    st.sampled_from([(), (), *SPLITS]),
    st.sampled_from(["plain", "spelt", "none"]),
)


def test_splits(cases):
    @FUZZ
    @given(
        SPLIT_TABLES,
        SPLIT_TABLES,
        SHARES,
        SHARES,
        st.integers(0, 2**32 - 1),
        st.none() | st.integers(2, 12).flatmap(lambda num: st.tuples(st.integers(1, num), st.just(num))),
        st.sampled_from(["prompt", "image", "group"]),
    )
    def split(first, second, test_size, val_size, seed, part, split_by):
        cases.num += 1
        options = {"test_size": test_size, "val_size": val_size, "seed": seed, "part": part}
        labelled = [
            examples.LabelledTable(title=name, table=table, ranges={}, labels=b"")
            for name, table in (("a", first), ("b", second))
        ]
        for given_sources in ([labelled[0]], labelled):
            with cases.one():
                folds = splits.assign_all_folds(given_sources, split_by, ("q", "c"), options)
                for source, own in zip(given_sources, folds, strict=True):
                    check_split(source.table, own, split_by)

    cases.run("splits", split)


def check_split(table: pd.DataFrame, folds: np.ndarray, split_by: str) -> None:
    """Every row is in one fold, each fold has rows, and what belongs together is together."""
    assert len(folds) == len(table) and set(folds) <= set(examples.FOLDS)
    if (table[["q", "c"]].notna()).any(axis=None):
        assert set(folds) == set(examples.FOLDS)
    if (table["split"] != "").any():
        kept = (folds == table["split"]) | ((table["split"] == "train") & (folds == "val"))
        assert kept.all(), "folds of the data's own are kept"
    elif split_by != "image":
        units = (
            table["reference"]
            if split_by == "group"
            else table["prompt"].map(lambda text: " ".join(text.casefold().split()))
        )
        assert (pd.Series(folds).groupby(units).nunique() == 1).all()


# -- images


def image_bytes() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 4), dtype=np.uint8))
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        (
            "JPEG",
            "RGB",
            {
                "exif": Image.Exif.__call__()
                if False
                else b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
            },
        ),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "I;16", {}),
        ("GIF", "P", {"save_all": True, "append_images": [noise.convert("P")]}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "F", {}),
        ("TIFF", "1", {"compression": "group4"}),
        ("PPM", "RGB", {}),
        ("JPEG2000", "RGB", {}),
    ]
    found = []
    for kind, mode, options in kinds:
        buffer = io.BytesIO()
        own = noise.convert("L").convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)
        own.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return [*found, b"P3 2 2 255 1 2 3 4 5 6 7 8 9 1 2 3", b"P6 17 13 65535 " + b"\0" * 17 * 13 * 6]


IMAGE_TOKENS = [
    *(struct.pack(form, number) for form in ("<I", ">I", "<H", ">H") for number in (0, 1, 0x7FFF, 0xFFFF, 9_000)),
    *(struct.pack(form, number) for form in ("<I", ">I") for number in (2**31 - 1, 2**32 - 1, 20_000_000)),
    *(
        b"\xff\xd8",
        b"\xff\xd9",
        b"\xff\xc0",
        b"\xff\xc2",
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"acTL",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
    ),
    *(
        b"RIFF",
        b"WEBPVP8X",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"P6 ",
        b" 99999 99999 255 ",
        b"P4",
        b"Pf",
        b"99",
        b"\0" * 64,
        b"\xff" * 64,
    ),
]


def test_image_bytes(cases, tmp_path):
    path = tmp_path / "a.png"

    @FUZZ
    @given(damaged(image_bytes(), IMAGE_TOKENS), st.sampled_from([None, 2, 224]), st.booleans())
    def load(content, image_size, as_file):
        cases.num += 1
        path.write_bytes(content)
        with cases.one(most_mb=1500):
            image = decoding.load_image(path if as_file else content, image_size)
            assert image.mode == "RGB" and 0 < image.width * image.height <= 2 * Image.MAX_IMAGE_PIXELS

    cases.run("images", load)


# -- checkpoints

STATE = {"a.weight": torch.arange(150.0).reshape(50, 3), "b": torch.zeros(0), "c": torch.tensor(7)}
SCORER = {"clip": {"a": [1, 2.5]}, "text": "é"}
SAFETENSORS_TOKENS = [
    *(struct.pack("<Q", number) for number in (0, 1, 8, 2**20, 2**31, 2**62, 2**63, 2**64 - 1)),
    *(
        b'"F32"',
        b'"I64"',
        b'"BOOL"',
        b'"F8_E4M3"',
        b"[50,3]",
        b"[3,2]",
        b"[0,24]",
        b"[24,0]",
        b"[-1]",
        b'"shape"',
        b'"dtype"',
    ),
    *(b'"__metadata__":{', b"data_offsets", b'"sha256"', b"9999999999", b"\\u0000", *JSON_TOKENS),
]


@st.composite
def safetensors_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with bytes or parts of its header changed."""
    if draw(st.booleans()):
        return draw(damaged([content], SAFETENSORS_TOKENS))
    length = 8 + int.from_bytes(content[:8], "little")
    header = spelt(json.dumps(draw(changed(json.loads(content[8:length]))))).encode()
    return struct.pack("<Q", len(header)) + header + content[length:]


def test_checkpoints(cases, tmp_path):
    whole = tmp_path / "whole"
    checkpoints.save_weights(whole, STATE, SCORER, lambda folder: None)
    contents = {name: (whole / name).read_bytes() for name in (checkpoints.WEIGHTS_FILE, checkpoints.DESCRIPTION_FILE)}
    weights = st.tuples(st.just(checkpoints.WEIGHTS_FILE), safetensors_files(contents[checkpoints.WEIGHTS_FILE]))
    descriptions = st.tuples(st.just(checkpoints.DESCRIPTION_FILE), json_files(SCORER))

    odd_kind = b'{"a": {"dtype": "F\\n32", "shape": [1], "data_offsets": [0, 4]}}'

    @FUZZ
    @example((checkpoints.WEIGHTS_FILE, struct.pack("<Q", len(odd_kind)) + odd_kind + bytes(4)))
    @given(weights | weights | descriptions)
    def load(found):
        cases.num += 1
        name, content = found
        (whole / name).write_bytes(content)
        for reader in (checkpoints.load_description, checkpoints.load_shapes):
            with cases.one():
                reader(whole)
        with cases.one():
            state, description = checkpoints.load_weights(whole)[1:]
            assert description == SCORER and state.keys() == STATE.keys()
            assert all(torch.equal(state[key], STATE[key]) for key in STATE), "damage went unseen"
        with cases.one():
            weight_shapes(whole / checkpoints.WEIGHTS_FILE)
        (whole / name).write_bytes(contents[name])

    cases.run("checkpoints", load)


NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.lists(st.integers(0, 255), max_size=4).map(lambda found: torch.tensor(found, dtype=torch.uint8))
    | st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(lambda found: np.array(found, np.float32)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=12,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all()) and a.shape == b.shape
    return type(a) is type(b) and a == b


def test_training_states(cases, tmp_path):
    run = tmp_path / "run"
    checkpoints.save_weights(run / checkpoints.BEST_DIR, STATE, SCORER, lambda folder: None)
    states = checkpoints.StateFolder(run, keep=2)
    saved = {1: {"step": 1, "weights": STATE}, 2: {"step": 2, "list": [1, None, {"a": np.zeros(2)}]}}
    states.save(1, None, saved[1])
    states.save(2, 1, saved[2])
    best, old, new = sorted(states.folder.iterdir())
    contents = {path: path.read_bytes() for path in sorted(states.folder.iterdir())}
    paths = st.lists(st.sampled_from(sorted(contents)), min_size=1, unique=True)

    @FUZZ
    @given(
        paths.flatmap(
            lambda some: st.tuples(*(st.tuples(st.just(path), safetensors_files(contents[path])) for path in some))
        ),
        NESTED,
    )
    def load(found, value):
        cases.num += 1
        for path, content in found:
            path.unlink()  # which may be the best weights themselves
            path.write_bytes(content)
        notes: list[str] = []
        with cases.one():
            state = states.load(lambda text: notes.append(str(text)))
            is_whole = [path.read_bytes() == contents[path] for path in (old, new, best)]
            # Headers can be spelt in another way that says the same; what is read is what was saved in any case.
            assert state is None or equal(state, saved[state["step"]])
            assert state is not None or not is_whole[0]
            assert not all(is_whole[1:]) or (state is not None and state["step"] == 2)
            if state is not None and state["step"] == 2:
                assert equal(read_tensors(states.best)[0], STATE), "the best weights are back"
            assert len(notes) == (2 if state is None else 2 - state["step"])
        for note in notes:
            check_message(note)
        with cases.one():
            tensors: dict[str, torch.Tensor] = {}
            packed = json.loads(json.dumps(pack(value, "state", tensors)))
            assert equal(unpack(packed, tensors), value)
        for path, content in contents.items():
            path.unlink()
            path.write_bytes(content)

    cases.run("training states", load)
    assert cases.num_refused == 0, "a damaged state is never an error"


# -- runs


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, demo_set) -> Path:
    """The folder of a tiny run, twice repeated, and its first part. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("fuzz") / "runs"
    argv = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1]), "--clip_model", "tiny"]
    argv += ["--clip_pretrained", "none", "--image_size", "56", "--epochs", "1", "--freeze_clip", "--no_report"]
    baseline.main([*argv, "--repeats", "2", "--output_dir", str(folder)])
    return folder


def test_run_folders(cases, tmp_path, finished_run, capsys):
    whole = Path(shutil.copytree(finished_run, tmp_path / "runs"))
    first = whole / json.loads((whole / "summary.json").read_text())["runs"][0]
    config = arguments.parse_args(["--config", str(first / "config.json")])

    def shown() -> None:
        run = run_data.read_run(first)
        for task in run.tasks:
            run.pairs(task)

    entry, entries = (lambda: comparison_page.read_entry(first, "a")), (lambda: comparison_page.read_entry(whole, "a"))
    kept, seen = (
        (lambda: protocol.finished_runs(protocol.SCORER, whole, {first.name: config})),
        (lambda: seen_by(first)),
    )
    again = [
        lambda flag=flag, path=path: arguments.parse_args([flag, str(path)])
        for flag, path in (("--config", first / "config.json"), ("--resume", first))
    ]
    readers: dict[Path, list[Callable[[], object]]] = {
        first / "config.json": [entry, kept, seen, *again],
        first / "results.json": [entry, shown, kept, lambda: answers.read_test_fold(first)],
        first / "predictions.csv": [
            shown,
            lambda: prompts_seen_by(first),
            lambda: comparison.scores_of(first, comparison.read_predictions(first)),
        ],
        first / "splits.csv": [shown, seen],
        first / "metrics.csv": [shown],
        whole / "summary.json": [entries, lambda: summaries.read_summary(whole)],
        whole / "protocol.json": [entries],
    }
    contents = {path: path.read_bytes() for path in readers}

    def damaged_file(path: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        found = contents[path]
        strategy = json_files(json.loads(found)) if path.suffix == ".json" else damaged([found], CSV_TOKENS)
        return st.tuples(st.just(path), strategy)

    options = json.loads(contents[first / "config.json"])

    @FUZZ
    @example((first / "config.json", json.dumps({**options, "init_from": 3}).encode()))
    @example((first / "config.json", json.dumps({**options, "init_from": str(first)}).encode()))
    @example((first / "splits.csv", b"name,digest\na,b\n"))
    @example((first / "metrics.csv", b"epoch,loss\n1," + b"9" * 300 + b"\n"))
    @example((first / "predictions.csv", b"name,prompt\na,b\n"))
    @example((first / "metrics.csv", b"epoch\n" + b"x" * 9999))
    @given(st.one_of(*map(damaged_file, readers)))
    def read(found):
        cases.num += 1
        path, content = found
        path.write_bytes(content)
        try:
            for reader in readers[path]:
                with cases.one():
                    reader()
        finally:
            path.write_bytes(contents[path])

    cases.run("run folders", read)
    capsys.readouterr()


def test_descriptions(cases, tmp_path, finished_run):
    name = json.loads((finished_run / "summary.json").read_text())["runs"][0]
    best = Path(shutil.copytree(finished_run / name / "best", tmp_path / "best"))
    path = best / checkpoints.DESCRIPTION_FILE

    @FUZZ
    @given(changed(json.loads(path.read_text())))
    def check(description):
        cases.num += 1
        path.write_text(spelt(json.dumps(description)))
        with cases.one():
            models.check_checkpoint(best)

    cases.run("descriptions", check)
