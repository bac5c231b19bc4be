"""What answers to GQA questions are worth, as its evaluation measures it (Hudson and Manning, 2019, section 4.4).

All shares are on 0..1; only balanced questions count. Records are those of the official question files.

Shapes: M regions, N boxes, X and Y pieces of an image across and down.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a question on something in common, such as "What do the bag and the wall have in common?", may be answered with.
COMMON = frozenset(("color", "material", "shape"))
NO_STEP = ("exist", "query: name", "choose name")  # the last question asked, which is no further step of reasoning

Records = Mapping[str, Mapping[str, Any]]
Choices = Mapping[str, Mapping[str, list[str]]]


def balanced(questions: Records) -> list[str]:
    """Ids of the questions that count."""
    return [name for name, question in questions.items() if question.get("isBalanced", True)]


def num_steps(question: Mapping[str, Any]) -> int:
    """Steps of reasoning that a question takes."""
    said = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(end in step for end in NO_STEP) for step in said)


def kinds_of(question: Mapping[str, Any]) -> dict[str, str]:
    """What accuracy is told by: the form of answer, structural and semantic type, steps and words."""
    types = question["types"]
    return {
        "answer": "open" if types["structural"] == "query" else "binary",
        "structural": types["structural"],
        "semantic": types["semantic"],
        "steps": str(num_steps(question)),
        "words": str(len(question["question"].split())),
    }


def measures(questions: Records, predictions: Mapping[str, str], choices: Choices | None = None) -> dict[str, float]:
    """Accuracy, and what else GQA's evaluation tells.

    Args:
        questions: all of a tier, with those that balanced ones entail.
        predictions: the answer to each of them; consistency needs those to the entailed questions too.
        choices: of `*_choices.json`, for validity and plausibility.

    Returns:
        "accuracy", "binary" and "open"; "consistency", the accuracy on what a question that was answered rightly
        entails; "validity" and "plausibility" where there are choices; "distribution", the chi-square distance of
        answers from people's, lower is better. What nothing was to be measured by is NaN.

    Raises:
        KeyError: a question without a prediction.
    """
    names = balanced(questions)
    is_right = {name: predictions[name] == questions[name]["answer"] for name in names}
    forms = {name: kinds_of(questions[name])["answer"] for name in names}
    found = {"accuracy": mean(is_right.values())}
    found |= {form: mean(is_right[name] for name in names if forms[name] == form) for form in ("binary", "open")}
    found["consistency"] = mean(
        consistency
        for name in names
        if is_right[name] and (consistency := entailed_accuracy(name, questions, predictions)) is not None
    )
    if choices is not None:
        for key, column in (("validity", "valid"), ("plausibility", "plausible")):
            found[key] = mean(predictions[name] in options(questions[name], choices[name][column]) for name in names)
    found["distribution"] = distribution({name: questions[name] for name in names}, predictions)
    return found


def mean(values: Any) -> float:
    """The mean of what there is; NaN of nothing."""
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


def options(question: Mapping[str, Any], choices: list[str]) -> frozenset[str]:
    """The answers that make sense for a question."""
    return COMMON if "Common" in question["types"]["detailed"] else frozenset(choices)


def entailed_accuracy(name: str, questions: Records, predictions: Mapping[str, str]) -> float | None:
    """The accuracy on the other questions that one entails; None if there are none."""
    others = [other for other in questions[name]["entailed"] if other != name]
    return mean(predictions[other] == questions[other]["answer"] for other in others) if others else None


def distribution(questions: Records, predictions: Mapping[str, str]) -> float:
    """The chi-square statistic of answers against people's in each global group, weighted by its size, / 100."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in questions.items():
        if (group := question["groups"]["global"]) is not None:
            gold[group][question["answer"]] += 1
            given[group][predictions[name]] += 1
    if not gold:
        return float("nan")
    sizes = {group: counts.total() for group, counts in gold.items()}
    distances = {
        group: sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in gold.items()
    }
    return sum(distances[group] * size for group, size in sizes.items()) / sum(sizes.values()) / 100


def accuracy_by_kind(questions: Records, predictions: Mapping[str, str]) -> dict[str, dict[str, tuple[float, int]]]:
    """{"structural": {"verify": (accuracy, number of questions), ...}, ...} for each of `kinds_of`."""
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for name in balanced(questions):
        for key, kind in kinds_of(questions[name]).items():
            found[key][kind].append(predictions[name] == questions[name]["answer"])
    return {
        key: {kind: (mean(rights), len(rights)) for kind, rights in sorted(kinds.items())}
        for key, kinds in found.items()
    }


def named_objects(question: Mapping[str, Any]) -> list[str]:
    """Ids of the objects that a question and its full answer name, each once; none where nobody has told."""
    told = question.get("annotations")
    parts = [told.get(key) for key in ("question", "fullAnswer")] if isinstance(told, dict) else []
    names = (name for part in parts if isinstance(part, dict) for name in part.values() if isinstance(name, str))
    return list(dict.fromkeys(names))


def covered(regions_M4: NDArray[Any], boxes_N4: NDArray[Any]) -> NDArray[np.float64]:
    """(M,) the share of each region's area that lies in at least one of the boxes; 0 of a region without area.

    Grounding is the attention on regions times these shares, summed: how much of it is on what is named. The boxes cut
    the image into pieces, each of which lies in a box wholly or not at all.
    """
    regions_M4, boxes_N4 = (np.asarray(each, dtype=np.float64).reshape(-1, 4) for each in (regions_M4, boxes_N4))
    lengths, insides = [], []
    for first in (0, 1):  # across, down
        starts_N, ends_N = boxes_N4[:, first], boxes_N4[:, first + 2]
        cuts = np.unique([starts_N, ends_N])
        low, high = cuts[:-1], cuts[1:]
        starts_M1, ends_M1 = regions_M4[:, first, None], regions_M4[:, first + 2, None]
        lengths.append((np.minimum(ends_M1, high) - np.maximum(starts_M1, low)).clip(min=0))
        insides.append((starts_N[:, None] <= low) & (high <= ends_N[:, None]))
    is_inside_XY = np.einsum("nx,ny->xy", *insides)
    shared_M = np.einsum("mx,my,xy->m", *lengths, is_inside_XY.astype(np.float64))
    areas_M = (regions_M4[:, 2:] - regions_M4[:, :2]).clip(min=0).prod(axis=1)
    return np.divide(shared_M, areas_M, out=np.zeros(len(regions_M4)), where=areas_M > 0)
