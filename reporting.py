"""What a run finds out: agreement, certainty, floors, and the tables that show them.

Scores come in label units (0..1) from the model and in MOS units from everything else; every table is in MOS units.
Data sets that were joined are measured each by itself: their raters never saw each other's images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

import calibration
import data
import metrics
from scores import MEASURES, TASKS, columns_of, title_of

Scores = Mapping[str, np.ndarray]  # task -> scores of a fold's images

MIN_PER_GENERATOR = 8  # labelled test images, below which a correlation says nothing
MAX_GENERATORS_SHOWN = 20


@dataclass(frozen=True)
class Base:
    """What a frozen CLIP knows, fitted on the training fold."""

    images: dict[str, tuple[np.ndarray, float]]  # scores of the image alone: weights (E,) and bias of the logit
    cosine: tuple[float, float] | None  # factor and offset of (cos + 1) / 2 for consistency; None without labels
    levels: dict[str, tuple[float, float]]  # likewise of the expected level of q and c; empty without levels

    @property
    def quality(self) -> tuple[ArrayLike, float] | None:
        """What the quality head starts from."""
        return self.levels.get("q") or self.images.get("q")

    @property
    def consistency(self) -> tuple[float, float] | None:
        """What the consistency head starts from."""
        return self.levels.get("c") or self.cosine

    def scores(self, known: Scores) -> dict[str, np.ndarray]:
        """Embeddings -> ridge probes (label units) and zero-shot cosine "c", which is in no units."""
        logits = {task: known["image"] @ weights + bias for task, (weights, bias) in self.images.items()}
        found = {task: 1 / (1 + np.exp(-values)) for task, values in logits.items()}
        return {**found, "c": known["cos"]} if self.cosine else found


def fit_base(known: Mapping[str, Scores], examples: data.Examples) -> Base:
    """Fit the base terms on the training fold's embeddings, those that are NaN left out."""
    rows = examples.rows("train")
    is_known = np.isfinite(known["train_eval"]["image"]).all(axis=1)
    groups = data.clusters(examples.table)[rows]
    images, levels = {}, {}
    cosine = None
    for task, values in examples.unit_targets.items():
        keep = ~np.isnan(values[rows]) & is_known
        target = values[rows][keep]
        if task == "c":
            cosine = calibration.fit_line((known["train_eval"]["cos"][keep] + 1) / 2, target)
        else:
            images[task] = calibration.fit_quality(known["train_eval"]["image"][keep], target, groups[keep])
        if f"level_{task}" in known["train_eval"]:
            levels[task] = calibration.fit_line(known["train_eval"][f"level_{task}"][keep], target)
    return Base(images, cosine, levels)


def parts(scores: Scores, fold: str, examples: data.Examples) -> Iterator[tuple[str, Scores, data.Examples]]:
    """A fold's scores and the examples, for each data set by itself: (title, scores, examples)."""
    sets = examples.table["set"].to_numpy()
    for title in examples.sets:
        here = sets[examples.rows(fold)] == title
        yield title, {task: values[here] for task, values in scores.items()}, examples.only(title)


def agreements(in_mos: Scores, fold: str, examples: data.Examples) -> dict[str, float]:
    """Agreement of a fold's predictions (MOS units) with the labels that exist: "srocc_q", ..., "main".

    Joined data sets give the mean over those that have the score.
    """
    found: dict[str, list[float]] = {}
    for _, scores, own in parts(in_mos, fold, examples):
        for task in own.scales:
            if task not in scores:
                continue
            mos = own.mos(task, fold)
            known = ~np.isnan(mos)
            for name, value in metrics.agreement(scores[task][known], mos[known]).items():
                found.setdefault(f"{name}_{task}", []).append(value)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    two = {key: means[key] for task in TASKS for key in (f"srocc_{task}", f"plcc_{task}") if key in means}
    return {**means, "main": metrics.main_score(two)} if two else means


def of_constants(folds: Mapping[str, Scores | None], examples: data.Examples) -> list[str]:
    """A line for each fold and score whose correlations are 0 by definition, since one side of them is constant.

    Args:
        folds: predictions of each fold; None looks at the human scores alone.
    """
    found = []
    for fold, scores in folds.items():
        for task in examples.scales:
            mos = examples.mos(task, fold)
            sides = {"human": mos, "predicted": None if scores is None else scores[task]}
            for side, values in sides.items():
                known = values[~np.isnan(mos)] if values is not None else np.empty(0)
                if len(known) and np.ptp(known) == 0:
                    what = f"all {len(known)} {side} scores of {title_of(task)} in the {fold} fold are equal"
                    found.append(f"{what}: correlations with them are 0 by definition")
    return found


def in_mos_units(scores: Scores, examples: data.Examples) -> dict[str, np.ndarray]:
    """Label units -> MOS units, of the scores that have labels."""
    return {task: scale.to_mos(scores[task]) for task, scale in examples.scales.items()}


def of_data(examples: data.Examples) -> dict[str, Any]:
    """What is to be known of the data: "images" (in each fold), "data_fingerprint", "test_digest" and "leakage"."""
    return {
        "images": {fold: len(examples.rows(fold)) for fold in data.FOLDS},
        "data_fingerprint": examples.fingerprint,
        "test_digest": examples.test_digest,
        "leakage": data.leakage(examples),
    }


def findings(scores: Scores, examples: data.Examples) -> dict[str, Any]:
    """What is to be known of the test fold's scores (label units) beside agreement.

    Returns:
        "certainty" and "generators" of one data set, empty for several; "sets": title -> "test" (agreement),
        "certainty" and "generators" of each of several.
    """
    in_mos = in_mos_units(scores, examples)
    if len(examples.sets) == 1:
        return {"certainty": certainty(in_mos, examples), "generators": generators(in_mos, examples), "sets": {}}
    sets = {}
    for title, own_scores, own in parts(in_mos, "test", examples):
        sets[title] = {
            "test": agreements(own_scores, "test", own),
            "certainty": certainty(own_scores, own),
            "generators": generators(own_scores, own),
        }
    return {"certainty": {}, "generators": {}, "sets": sets}


def certainty(in_mos: Scores, examples: data.Examples) -> dict[str, dict[str, Any]]:
    """How sure the test fold's scores are, and what correlations do not tell: a part for each task of one data set.

    Returns:
        Task -> 95 % intervals of srocc and plcc (bootstrap over prompts; absent with a single prompt), the share of
        pairs of the same prompt that are ordered as people order them and their number, slope and bias (MOS units).
    """
    groups = data.clusters(examples.table)[examples.rows("test")]
    found = {}
    for task in examples.scales:
        mos = examples.mos(task, "test")
        known = ~np.isnan(mos)
        found[task] = certainty_of(in_mos[task][known], mos[known], groups[known])
    return found


def certainty_of(pred: np.ndarray, mos: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """`certainty` of one task: predictions and labels (n,) in MOS units, and the prompt number of each."""
    names: list[int] = groups.tolist()
    accuracy, num_pairs = metrics.within_group_accuracy(pred, mos, names)
    return {
        "intervals": {name: list(ends) for name, ends in metrics.cluster_bootstrap(pred, mos, names).items()},
        "within_prompt": {"accuracy": accuracy, "pairs": num_pairs},
        **metrics.calibration_line(pred, mos),
    }


def generator_table(pred: np.ndarray, mos: np.ndarray, generators: np.ndarray) -> pd.DataFrame:
    """How well each generator's images are judged: generator, images, srocc, plcc, mos and pred (means), MOS units.

    Generators with fewer than MIN_PER_GENERATOR images are left out; the worst comes first.
    """
    rows = []
    for name in sorted(set(generators)):
        own = generators == name
        if name and own.sum() >= MIN_PER_GENERATOR:
            agreed = {"srocc": metrics.srocc(pred[own], mos[own]), "plcc": metrics.plcc(pred[own], mos[own])}
            means = {"mos": float(mos[own].mean()), "pred": float(pred[own].mean())}
            rows.append({"generator": name, "images": int(own.sum()), **agreed, **means})
    columns = ["generator", "images", "srocc", "plcc", "mos", "pred"]
    return pd.DataFrame(rows, columns=columns).sort_values("srocc", kind="stable", ignore_index=True)


def generators(in_mos: Scores, examples: data.Examples) -> dict[str, dict[str, Any]]:
    """The test fold by generator: a part for each task of one data set; none where no two generators have images.

    Returns:
        Task -> "by_generator" (rows of `generator_table`, the worst first), "worst" (its name), and "ranking": SROCC
        of the generators' mean predicted and mean human scores.
    """
    names = examples.table["group"].to_numpy()[examples.rows("test")]
    found: dict[str, dict[str, Any]] = {}
    for task in examples.scales:
        mos = examples.mos(task, "test")
        known = ~np.isnan(mos)
        found |= by_generator(task, in_mos[task][known], mos[known], names[known])
    return found


def by_generator(task: str, pred: np.ndarray, mos: np.ndarray, names: np.ndarray) -> dict[str, dict[str, Any]]:
    """`generators` of one task: predictions, labels and the generator's name of each image (n,)."""
    table = generator_table(pred, mos, names)
    if len(table) < 2:
        return {}
    ranking = metrics.srocc(table["pred"], table["mos"])
    rows = table.to_dict("records")
    return {task: {"by_generator": rows, "worst": rows[0]["generator"], "ranking": ranking}}


def floors(
    examples: data.Examples, base: Base, known: Mapping[str, Scores], statistics_NS: np.ndarray
) -> dict[str, dict[str, float]]:
    """What simple predictors reach on the test fold, fitted on the training fold.

    Without looking at a pixel: the mean, each generator's mean and, where prompts are shared between folds, each
    prompt's mean and both. With pixels: ridge regression on simple statistics of the image, the zero-shot cosine, and
    ridge probes on the frozen CLIP's embeddings.

    Args:
        known: fold -> "image" (n, E) and, with prompts, "text" (n, E) and "cos" (n,), of the frozen CLIP.
        statistics_NS: (n, S) of all images.
            Training rows that are NaN, here or there, were dropped and teach nothing.
    """
    found = {name: agreements(scores, "test", examples) for name, scores in pixel_free(examples).items()}
    train, test = examples.rows("train"), examples.rows("test")
    from_statistics = ridge_scores(examples, statistics_NS[train], statistics_NS[test], list(examples.scales))
    found["image_statistics"] = agreements(from_statistics, "test", examples)
    probes = base.scores(known["test"])
    if "c" in probes:
        found["zero_shot_cosine"] = agreements({"c": probes.pop("c")}, "test", examples)
        fit, held = (
            np.hstack([known[fold]["image"], known[fold]["image"] * known[fold]["text"]])
            for fold in ("train_eval", "test")
        )
        probes |= ridge_scores(examples, fit, held, ["c"])
    found["ridge_probe"] = agreements(probes, "test", examples)
    levels = {task: known["test"][f"level_{task}"] for task in base.levels}
    return {**found, "zero_shot_levels": agreements(levels, "test", examples)} if levels else found


def pixel_free(examples: data.Examples) -> dict[str, dict[str, np.ndarray]]:
    """Scores (MOS units) of the test fold from group means of the training fold: predictor -> task -> (n,)."""
    set_codes = pd.factorize(examples.table["set"])[0]
    makers = pd.factorize(examples.table["set"] + "\0" + examples.table["group"])[0]
    prompts = data.prompt_groups(examples.table)
    train, test = examples.rows("train"), examples.rows("test")
    found: dict[str, dict[str, np.ndarray]] = {"mean": {}, "generator_mean": {}}
    if np.isin(prompts[test], prompts[train]).any():
        found |= {"prompt_mean": {}, "generator_and_prompt_mean": {}}
    for task in examples.scales:
        mos = examples.table[task].to_numpy()
        fit = train[~np.isnan(mos[train])]

        def mean_of(codes: np.ndarray, fit: np.ndarray = fit, mos: np.ndarray = mos) -> np.ndarray:
            return metrics.group_mean_predictor(codes[fit], mos[fit], codes[test])

        found["mean"][task] = mean_of(set_codes)
        found["generator_mean"][task] = mean_of(makers)
        if "prompt_mean" in found:
            found["prompt_mean"][task] = mean_of(prompts)
            found["generator_and_prompt_mean"][task] = mean_of(makers) + mean_of(prompts) - mean_of(set_codes)
    return found


def ridge_scores(
    examples: data.Examples, train_ND: np.ndarray, test_MD: np.ndarray, tasks: list[str]
) -> dict[str, np.ndarray]:
    """Ridge regression of each task's labels on features of the training fold: task -> (m,) of the test fold, in MOS.

    The penalty is chosen by cross-validation over prompts.
    """
    rows = examples.rows("train")
    groups = data.clusters(examples.table)[rows]
    is_known = np.isfinite(train_ND).all(axis=1)
    centre, spread = train_ND[is_known].mean(axis=0), train_ND[is_known].std(axis=0)
    # Rows of length 1 on average, as the embeddings are for which the penalties were chosen.
    size = np.where(spread > 0, spread, 1.0) * np.sqrt(train_ND.shape[1])
    train, test = ((values - centre) / size for values in (train_ND, test_MD))
    found = {}
    for task in tasks:
        mos = examples.mos(task, "train")
        keep = ~np.isnan(mos) & is_known
        weights, bias = calibration.fit_ridge(train[keep], mos[keep], groups[keep])
        found[task] = test @ weights + bias
    return found


def prediction_table(scores: Mapping[str, Scores], examples: data.Examples) -> pd.DataFrame:
    """One row per image in MOS units; the columns of a task without scores are empty."""
    tables = []
    for name, predicted in scores.items():
        fold = name.removesuffix("_eval")
        rows = examples.rows(fold)
        table = examples.table.iloc[rows]
        part = pd.DataFrame(
            {
                "row": rows,
                "name": table["name"].to_numpy(),
                "set": table["set"].to_numpy(),
                "split": fold,
                "prompt": table["prompt"].to_numpy(),
                "generator": table["group"].to_numpy(),
                "cluster": data.clusters(examples.table)[rows],
            }
        )
        for task in dict.fromkeys([*TASKS, *examples.scales]):
            mos_column, pred_column = columns_of(task)
            part[mos_column] = examples.mos(task, fold)
            known = task in examples.scales
            part[pred_column] = examples.scales[task].to_mos(predicted[task]) if known else np.nan
        part.loc[(table["prompt"] == "").to_numpy(), columns_of("c")[1]] = np.nan
        tables.append(part)
    return pd.concat(tables).sort_values("row").drop(columns="row")


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """One line on an epoch."""
    tasks = [name.removeprefix("val_srocc_") for name in row if name.startswith("val_srocc_")]

    def pair(name: str) -> str:
        return " ".join(f"{task} {row[f'{name}_{task}']:.3f}" for task in tasks)

    rationale = f" exp {row['loss_exp']:.3f}" if "loss_exp" in row else ""
    return (
        f"epoch {int(row['epoch']):>{len(str(epochs))}}/{epochs}  loss {row['loss']:.4f} ({pair('loss')}{rationale})  "
        f"val {row['val_loss']:.4f}  SROCC {pair('val_srocc')}  PLCC {pair('val_plcc')}  "
        f"lr {row['lr']:.1e}  {row['images_per_s']:.0f} img/s, waited {row['data_wait']:.0%}  {row['seconds']:.1f} s"
    )


def results_table(results: Mapping[str, Any], examples: data.Examples) -> str:
    """The test fold's scores beside the floors; the validation fold's if the test fold was left unread."""
    fold, title = ("test", "test") if results["test"] else ("val", "validation")
    by_set = {f"  on {title}": part["test"] for title, part in results["sets"].items()}
    rows = {"trained model": results[fold], **by_set, **results["floors"]}
    lines = [
        f"{title} fold: {len(examples.rows(fold))} images, weights of epoch {results['best_epoch']} of "
        f"{results['epochs']}, {results['seconds']:.0f} s in all",
        *score_table(rows, list(examples.scales)),
        *certainty_lines(results["certainty"]),
        *generator_lines(results["generators"]),
    ]
    for title, part in results["sets"].items():
        lines += [f"{title}: {line}" for line in certainty_lines(part["certainty"])]
    added = ", ".join(
        f"{title_of(task)} {results[fold][key] - results['base'][fold][key]:+.3f}"
        for task in examples.scales
        for key in [f"srocc_{task}"]
    )
    lines.append(f"SROCC added by training to what CLIP knew before (ridge probe, cosine): {added}")
    if "main" in results[fold]:
        lines.append(f"main score (mean of SROCC and PLCC): {results[fold]['main']:.3f}")
    return "\n".join(lines)


def score_table(rows: Mapping[str, Mapping[str, float]], tasks: list[str]) -> list[str]:
    """Lines of a table: for each task the measures of every row that has them."""
    width = max(len(name) for name in rows) + 1
    first = max(12, *(len(title_of(task)) for task in tasks)) + 1
    lines = [f"{'':<{width + first}}" + "".join(f"{title:>12}" for title in MEASURES.values())]
    for task in tasks:
        title = title_of(task)
        for name, row in rows.items():
            if f"srocc_{task}" in row:
                cells = "".join(f"{row[f'{key}_{task}']:>12.3f}" for key in MEASURES)
                lines.append(f"{title:<{first}}{name.replace('_', ' '):<{width}}{cells}")
                title = ""
    return lines


def certainty_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`certainty` in words, a line for each task."""
    lines = []
    for task, part in found.items():
        said = [f"{name.upper()} {low:.3f} .. {high:.3f}" for name, (low, high) in part["intervals"].items()]
        words = [f"95 % intervals over prompts: {', '.join(said)}"] if said else []
        if part["within_prompt"]["pairs"]:
            words.append(f"pairs of one prompt ordered right: {part['within_prompt']['accuracy']:.1%}")
        words.append(f"slope {part['slope']:.2f}, bias {part['bias']:+.2f}")
        lines.append(f"{title_of(task)}: {'; '.join(words)}")
    return lines


def generator_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`generators` as a table, a row for each generator, the worst of the first task first."""
    if not found:
        return []
    first = next(iter(found.values()))["by_generator"]
    of_task = {task: {row["generator"]: row for row in part["by_generator"]} for task, part in found.items()}
    width = max(len(row["generator"]) for row in first[:MAX_GENERATORS_SHOWN]) + 2
    titles = [f"{title_of(task)[:11]:>12} {'MOS':>6} {'pred':>6}" for task in found]
    lines = [f"{'SROCC by generator':<{max(width, 20)}}{'images':>6}{''.join(titles)}"]
    for row in first[:MAX_GENERATORS_SHOWN]:
        name = row["generator"]
        cells = [
            f"{own['srocc']:>12.3f} {own['mos']:>6.2f} {own['pred']:>6.2f}" if own else f"{'':>26}"
            for own in (rows.get(name) for rows in of_task.values())
        ]
        lines.append(f"{name:<{max(width, 20)}}{row['images']:>6}{''.join(cells)}")
    if len(first) > MAX_GENERATORS_SHOWN:
        lines.append(f"... and {len(first) - MAX_GENERATORS_SHOWN} more in results.json")
    ranks = ", ".join(f"{title_of(task)} {part['ranking']:.3f}" for task, part in found.items())
    return [*lines, f"SROCC of the generators' means: {ranks}"]
