"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sources.examples import Examples
from sources.scores import MEASURES, title_of

MAX_GENERATORS_SHOWN = 20


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


def results_table(results: Mapping[str, Any], examples: Examples) -> str:
    """The test fold's scores beside the floors; the validation fold's if the test fold was left unread."""
    fold, title = ("test", "test") if results["test"] else ("val", "validation")
    by_set = {f"  on {title}": part["test"] for title, part in results["sets"].items()}
    rows = {"trained model": results[fold], **by_set, **results["floors"]}
    lines = [
        f"{title} fold: {len(examples.rows(fold))} images, {kept(results)}, {results['seconds']:.0f} s in all",
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
    lines.append(f"SROCC added by training to what CLIP knew before: {added}")
    if "main" in results[fold]:
        lines.append(f"main score (mean of SROCC and PLCC): {results[fold]['main']:.3f}")
    return "\n".join(lines)


def kept(results: Mapping[str, Any]) -> str:
    """Which epoch's weights a run has kept."""
    best, epochs = results["best_epoch"], results["epochs"]
    return (
        f"weights of epoch {best} of {epochs}" if best else f"none of {epochs} epochs better than the untrained model"
    )


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
