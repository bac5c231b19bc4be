"""What the tables and lines for the terminal say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from made_examples import (
    AUTHENTICITY,
    ENOUGH,
    FOLDS,
    MEASURES,
    MOS,
    by_makers,
    examples_of,
    guesses,
    joined_examples,
    knowledge,
    label_units,
)

from evaluation import agreement, floors, probes, text_tables
from sources.examples import Examples
from sources.scores import MEASURES as TITLES
from sources.scores import TASKS


def row_of(seed: int, *tasks: str) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"{name}_{task}": float(rng.uniform(-1, 1)) for task in tasks for name in MEASURES}


def test_the_table_of_scores_has_a_line_for_each_predictor_that_gives_the_score():
    rows = {"trained model": row_of(0, "q", "c"), "zero_shot_cosine": row_of(1, "c"), "mean": row_of(2, "q", "c")}
    lines = text_tables.score_table(rows, ["q", "c"])
    assert lines[0].split() == " ".join(TITLES.values()).split()
    expected = []
    for title, task, names in (
        ("quality", "q", ["trained model", "mean"]),
        ("consistency", "c", ["trained model", "zero_shot_cosine", "mean"]),
    ):
        for name in names:
            numbers = [f"{rows[name][f'{measure}_{task}']:.3f}" for measure in MEASURES]
            expected.append([*([title] if name == names[0] else []), *name.replace("_", " ").split(), *numbers])
    assert [line.split() for line in lines[1:]] == expected
    assert len({len(line) for line in lines}) == 1


def test_the_table_of_generators_has_both_scores_of_each():
    examples, pred = by_makers()
    examples = replace(examples, table=examples.table.assign(c=examples.table["q"] / 2), scales={"q": MOS, "c": MOS})
    examples.table.loc[0, "c"] = np.nan  # "good" has one too few
    examples.table.loc[examples.table["group"] == "few", "group"] = "bad"
    examples.table.loc[examples.table["group"] == "", "group"] = "other"
    found = agreement.generators({"q": pred, "c": pred / 2}, examples)
    lines = text_tables.generator_lines(found)
    of_c = {row["generator"]: row for row in found["c"]["by_generator"]}
    expected = []
    for row in found["q"]["by_generator"]:
        name = row["generator"]
        expected.append([name, str(row["images"])])
        for own in [row, *([of_c[name]] if name in of_c else [])]:
            expected[-1] += [f"{own['srocc']:.3f}", f"{own['mos']:.2f}", f"{own['pred']:.2f}"]
    assert [line.split() for line in lines[1:-1]] == expected
    assert [len(row) for row in expected] == [8, 5, 8] and expected[0][0] == "bad"
    assert " ".join(lines[0].split()) == "SROCC by generator images quality MOS pred consistency MOS pred"
    rankings = ", ".join(f"{title} {found[task]['ranking']:.3f}" for task, title in TASKS.items())
    assert lines[-1] == f"SROCC of the generators' means: {rankings}"
    assert text_tables.generator_lines({}) == []


def test_of_many_generators_the_worst_are_shown_and_the_others_counted():
    shown = text_tables.MAX_GENERATORS_SHOWN
    names = [f"g{i:02}" for i in range(shown + 3) for _ in range(ENOUGH)]
    examples = examples_of(["test"] * len(names), group=names, c=np.nan)
    found = agreement.generators(guesses(examples), examples)
    lines = text_tables.generator_lines(found)
    worst = [row["generator"] for row in found["q"]["by_generator"][:shown]]
    assert [line.split()[0] for line in lines[1 : shown + 1]] == worst
    assert lines[shown + 1] == "... and 3 more in results.json"
    assert len(lines) == shown + 3


def test_certainty_in_words():
    part = {
        "intervals": {"srocc": [0.1, 0.25], "plcc": [-0.5, 0.5]},
        "within_prompt": {"accuracy": 0.625, "pairs": 8},
        "slope": 1.25,
        "bias": -0.125,
    }
    bare = {"intervals": {}, "within_prompt": {"accuracy": None, "pairs": 0}, "slope": 0.5, "bias": 2.0}
    assert text_tables.certainty_lines({"q": part, "authenticity": bare}) == [
        "quality: 95 % intervals over prompts: SROCC 0.100 .. 0.250, PLCC -0.500 .. 0.500; "
        "pairs of one prompt ordered right: 62.5%; slope 1.25, bias -0.12",
        "authenticity: slope 0.50, bias +2.00",
    ]


def test_a_line_on_an_epoch_names_every_score():
    row = {
        "epoch": 3,
        "loss": 0.12345,
        "loss_q": 0.1,
        "loss_c": 0.2,
        "loss_beauty": 0.3,
        "val_loss": 0.5,
        "lr": 3e-5,
        "images_per_s": 123.4,
        "data_wait": 0.25,
        "seconds": 9.87,
    }
    row |= {"val_srocc_q": 0.61, "val_srocc_c": 0.62, "val_srocc_beauty": 0.63}
    row |= {"val_plcc_q": 0.71, "val_plcc_c": 0.72, "val_plcc_beauty": 0.73}
    line = text_tables.epoch_line(row, 20)
    assert line == (
        "epoch  3/20  loss 0.1235 (q 0.100 c 0.200 beauty 0.300)  val 0.5000  "
        "SROCC q 0.610 c 0.620 beauty 0.630  PLCC q 0.710 c 0.720 beauty 0.730  "
        "lr 3.0e-05  123 img/s, waited 25%  9.9 s"
    )
    assert "beauty 0.300 exp 0.900)" in text_tables.epoch_line({**row, "loss_exp": 0.9}, 20)


def results_of(examples: Examples) -> dict[str, Any]:
    """Results as a run gathers them."""
    scores, known = guesses(examples), knowledge(examples)
    base = probes.fit_base(known, examples)
    statistics = np.random.default_rng(0).normal(size=(len(examples.table), 3))
    return {
        "best_epoch": 4,
        "epochs": 7,
        "seconds": 61.6,
        "test": agreement.agreements(scores, "test", examples),
        "base": {"test": agreement.agreements(base.scores(known["test"]), "test", examples)},
        "floors": floors.floors(examples, base, known, statistics),
        **agreement.test_findings(label_units(scores, examples), examples),
    }


def test_the_results_of_one_data_set_in_text():
    examples = examples_of(FOLDS, group=["a", "b"] * (len(FOLDS) // 2), authenticity=AUTHENTICITY)
    results = results_of(examples)
    lines = text_tables.results_table(results, examples).splitlines()
    assert lines[0] == "test fold: 40 images, weights of epoch 4 of 7, 62 s in all"
    rows = {"trained model": results["test"], **results["floors"]}
    parts = [
        *text_tables.score_table(rows, ["q", "c", "authenticity"]),
        *text_tables.certainty_lines(results["certainty"]),
        *text_tables.generator_lines(results["generators"]),
    ]
    assert lines[1:-2] == parts
    gains = [results["test"][f"srocc_{task}"] - results["base"]["test"][f"srocc_{task}"] for task in examples.scales]
    assert lines[-2].endswith("quality {:+.3f}, consistency {:+.3f}, authenticity {:+.3f}".format(*gains))
    assert lines[-1] == f"main score (mean of SROCC and PLCC): {results['test']['main']:.3f}"


def test_where_no_epoch_is_better_the_untrained_model_is_what_was_kept():
    examples = examples_of(FOLDS)
    first, *_ = text_tables.results_table({**results_of(examples), "best_epoch": 0}, examples).splitlines()
    assert first == "test fold: 40 images, none of 7 epochs better than the untrained model, 62 s in all"


def test_the_results_of_several_data_sets_have_a_line_for_each():
    joined = joined_examples()
    results = results_of(joined)
    text = text_tables.results_table(results, joined)
    table = [line.split() for line in text.splitlines()]
    for title, tasks in (("both", "qc"), ("photos", "q")):
        part = results["sets"][title]
        for task in tasks:
            numbers = [f"{part['test'][f'{name}_{task}']:.3f}" for name in MEASURES]
            assert ["on", title, *numbers] in table
        for line in text_tables.certainty_lines(part["certainty"]):
            assert f"{title}: {line}" in text.splitlines()
    assert sum(row[:2] == ["on", "photos"] for row in table) == 1
    assert sum(row[:2] == ["on", "both"] for row in table) == 3
