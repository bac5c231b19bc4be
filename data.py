"""The data that the options name: a CSV, data sets as downloaded, or several together; read, checked, split, scaled.

python data.py describe [flags of baseline.py]      # what it holds, before anything is trained on it
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cli.errors import one_line_errors
from configs import TrainingConfig
from guidance.arguments import parse_args
from sources import assemble, csv_files, demo, labels
from sources.describe import describe
from sources.examples import FOLDS, Examples, LabelledTable
from sources.image_names import spelling
from sources.splits import suitable_unit
from storage import tables
from storage.messages import first_five, quoted

USAGE = "python data.py describe [--data_csv_path CSV --image_base_dir DIR | --dataset NAME --data_root DIR] [flags]"


REAL_DEMO = Path(__file__).resolve().parent / "assets" / "agiqa-demo"


def find_demo(config: TrainingConfig) -> TrainingConfig:
    """The config with the paths to the demo set, which is drawn first if it is to be and was not before."""
    if config.demo == "real":
        return replace(config, data_csv_path=str(REAL_DEMO / "data.csv"), image_base_dir=str(REAL_DEMO / "images"))
    # Named after the code that draws it, so that an older program's set is never taken for this one's.
    version = hashlib.sha256(Path(demo.__file__).read_bytes()).hexdigest()[:8]
    csv_path, image_dir = demo.write_demo_set(Path(config.cache_dir) / f"demo-{version}")
    return replace(config, data_csv_path=str(csv_path), image_base_dir=str(image_dir))


def read_examples(config: TrainingConfig) -> Examples:
    """The data set, or sets, that the options name, split. Raises ValueError."""
    return assemble_examples(config, read_sources(config))


def count_training_images(config: TrainingConfig) -> int:
    """About how many images the training fold will have, without looking at them. Raises ValueError."""
    share = 1 - (1 / config.kfold if config.kfold else config.test_size) - config.val_size
    if config.demo == "drawn":
        return round(len(demo.plan_demo_set()) * share)
    count = 0.0
    for source in read_sources(find_demo(config) if config.demo else config):
        splits = set(source.table["split"])
        if splits == {""}:
            count += len(source.table) * share
        else:  # validation is taken out of training where the data has none
            own = (source.table["split"] == "train").sum()
            count += own if "val" in splits or "test" not in splits else own * (1 - config.val_size)
    return round(count)


def read_sources(config: TrainingConfig) -> list[LabelledTable]:
    """The data sets that the options name. Raises ValueError."""
    extra = config.extra_score_names
    roots = iter(config.data_roots)
    given = {"q": config.mos_range_q, "c": config.mos_range_c}
    sources = []
    for name in config.dataset_names:
        if name == "csv":
            sources.append(read_csv_source(config, given))
        else:
            ranges = given if len(config.dataset_names) == 1 else {}
            sources.append(read_named_source(name, Path(next(roots)), ranges, **name_rules(config)))
    sources = [with_columns(source, extra) for source in sources]
    for name in extra:
        if all(source.table[name].isna().all() for source in sources):
            raise ValueError(f"--extra_scores {name}: {config.dataset} has no such scores")
    if config.split_file and Path(config.split_file).exists():
        sources = fixed_splits(sources, Path(config.split_file))
    return sources


def assemble_examples(config: TrainingConfig, sources: list[LabelledTable]) -> Examples:
    """The data sets as one, split as the options say. Raises ValueError."""
    return assemble.build_examples(
        sources,
        split_by=[suitable_unit(source.title, source.table, config.split_by) for source in sources],
        extra=config.extra_score_names,
        test_size=config.test_size,
        val_size=config.val_size,
        seed=config.seed,
        part=(config.fold, config.kfold) if config.fold else None,
        skip_bad=config.bad_images == "skip",
    )


def read_csv_source(config: TrainingConfig, ranges: dict[str, tuple[float, float] | None]) -> LabelledTable:
    """The CSV. Raises ValueError."""
    columns = csv_files.Columns.from_options(config)
    # Beside other data sets it may lack an extra score, alone it may not.
    extra = config.extra_score_names
    if len(config.dataset_names) > 1:
        extra = csv_files.columns_present(config.data_csv_path, extra, columns.names)
    notes: list[str] = []
    table = csv_files.read_table(
        config.data_csv_path,
        config.image_base_dir,
        columns,
        extra=extra,
        duplicates=config.duplicates,
        say=notes.append,
        **name_rules(config),
    )
    labels_read = Path(config.data_csv_path).read_bytes()
    return LabelledTable(title="csv", table=table, ranges=ranges, labels=labels_read, notes=tuple(notes))


def name_rules(config: TrainingConfig) -> dict[str, bool]:
    """What `image_names.check_image_names` is to allow."""
    return {"follow_links": config.follow_links, "may_be_missing": config.bad_images == "skip"}


def read_named_source(
    name: str, root: Path, given: dict[str, tuple[float, float] | None], **rules: bool
) -> LabelledTable:
    """A data set as downloaded; `rules` are those of `image_names.check_image_names`. Raises ValueError."""
    notes: list[str] = []
    found = labels.read_dataset(name, root, leave_out=not rules["may_be_missing"], say=notes.append)
    table = assemble.named_table(found, root, labels.image_folders(name), say=notes.append, **rules)
    known = labels.DATASETS[name].ranges
    ranges = {task: given.get(task) or known.get(task) for task in {*known, *given}}
    labels_read = table.drop(columns="path").to_csv().encode()
    return LabelledTable(title=name, table=table, ranges=ranges, labels=labels_read, notes=tuple(notes))


def with_columns(source: LabelledTable, extra: list[str]) -> LabelledTable:
    """The same with a column for each extra score, empty where the data set has none."""
    missing = {name: float("nan") for name in extra if name not in source.table}
    return replace(source, table=source.table.assign(**missing))


def fixed_splits(sources: list[LabelledTable], path: Path) -> list[LabelledTable]:
    """The same with the folds that a file gives by name. Raises ValueError."""
    notes: list[str] = []
    raw = csv_files.read_csv(path, ["name", "split"], say=notes.append)
    missing = [column for column in ("name", "split") if column not in raw.columns]
    if missing:
        raise ValueError(f"--split_file {path}: no column {missing[0]!r}; it must have name and split")
    names = raw["name"].str.strip().map(tables.unescape)  # a run's own splits.csv, or one written by hand
    keys = names.map(spelling)
    if keys.duplicated().any():
        raise ValueError(f"--split_file {path}: {quoted(names[keys.duplicated()].iloc[0])} occurs more than once")
    folds = dict(zip(keys, raw["split"].str.strip(), strict=True))
    found = []
    for source in sources:
        prefix = f"{source.title}/" if len(sources) > 1 else ""
        both = zip(source.table["name"], source.table.get("written", source.table["name"]), strict=True)
        found_folds = [
            folds.get(spelling(prefix + name)) or folds.get(spelling(prefix + written), "") for name, written in both
        ]
        split = pd.Series(found_folds, source.table.index)
        if (split == "").any():
            count, first = (split == "").sum(), source.table["name"][split == ""].iloc[0]
            raise ValueError(
                f"--split_file {path}: {count} image(s) have no fold there, such as {first_five([prefix + first])}"
            )
        if wrong := sorted(set(split) - set(FOLDS)):
            raise ValueError(f"--split_file {path}: split is {quoted(wrong[0])}, must be train, val or test")
        found.append(replace(source, table=source.table.assign(split=split), notes=(*source.notes, *notes)))
    return found


def describe_data(config: TrainingConfig) -> str:
    """What the data that the options name holds, as text; several data sets each by itself. Raises ValueError."""
    sources = read_sources(config)
    whole = assemble_examples(config, sources)
    sets = [assemble_examples(config, [source]) for source in sources] if len(sources) > 1 else [whole]
    return describe(whole, sets)


def main(argv: Sequence[str] | None = None) -> None:
    """Describe the data that the command line names."""
    with one_line_errors():
        command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
        if command != "describe":
            raise ValueError(f"usage: {USAGE}")
        config = parse_args(flags)
        print(describe_data(find_demo(config) if config.demo else config))


if __name__ == "__main__":
    main()
