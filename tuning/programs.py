"""The programs whose options are searched: which options those are, what usual spaces are, and how flags are read.

No torch here, nor Optuna.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from answering import configs as answering_configs
from answering.configs import BRANCH_OPTIONS, VQAConfig, recommended
from cli.options import Option
from cli.parser import OneLineParser
from configs import NOT_SAVED, OPTIONS, VIEWS, TrainingConfig, parse_loss, parse_unfreeze_schedule
from guidance import arguments
from guidance.presets import command_line
from tuning.space import Dimension, Space, read_space

# Of these groups an option says what is compared (images, scores, folds), or is the search's own to set.
COMPARED = ("data", "meta")
DEEP = 20  # blocks, from which freeze_layers goes in steps of two
# What main.py searches, by the keys of BRANCH_OPTIONS, and "" in any case. Ranges are the recommended ones.
USUAL = {
    "": ("lr", "dropout"),
    "fine": ("num_hid", "AOA_layers", "omega_q"),
    "graph": ("mgat_layers", "sample_k"),
    "coarse": (),
    "xvlm": ("xvlm_lr",),
    "fused": ("fusion_ratio",),
}
LOGARITHMIC = ("lr", "xvlm_lr")
DOUBLED = ("num_hid",)  # whose values are powers of two
OF_DEMO = {"lr": (3e-4, 3e-3), "num_hid": (64, 256), "AOA_layers": (0, 2)}  # a small set needs small models
# The tuning guide's three experiments with main.py.
EXPERIMENTS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "learning_rate": {"lr": (2e-4, 2.8e-4, 3.5e-4), "xvlm_lr": (3e-5, 5e-5, 7e-5)},
    "complexity": {"AOA_layers": (4, 6, 8), "num_hid": (512, 1024, 2048)},
    "isubgvqa": {"mgat_layers": (3, 4, 6), "alpha": (0.8, 1.0, 1.5), "beta": (8.0, 10.0, 15.0)},
}
LOOKED_AT = ("question_len", "max_boxes", "num_stat_word", "tfidf", "least_answers")  # how much of the data is read
FOLLOWS = {  # options that only some samplers have
    "alpha": ("imle", "aimle"),
    "beta": ("imle",),
    "tau": ("imle", "aimle", "gumbel", "soft"),
}


@dataclass(frozen=True)
class Program:
    """What a search has to know of the program whose options it searches."""

    script: str
    options: Mapping[str, Option]
    not_saved: Collection[str]
    folder: str  # the option that names a run's folder
    parser: Callable[[], OneLineParser]
    parse_args: Callable[..., Any]  # flags, and what only torch can tell -> options
    check: Callable[[Any], None]  # raises ValueError for options that no trial can have
    of_trials: Callable[[Any, frozenset[str]], Any]  # options, and the names of those that flags fix -> of all trials
    score: Callable[[Any], str]  # what trials are compared by, as "val" in the results names it
    may_be_searched: Callable[[str], bool]
    check_value: Callable[[str, Any], None]
    check_space: Callable[[Space, Any, frozenset[str]], None]  # raises ValueError for one that would waste trials
    default_space: Callable[[Any, int | None, frozenset[str]], Space]
    ready_spaces: Callable[[Any], Mapping[str, Space]]
    complete: Callable[[Space, dict[str, Any], frozenset[str]], dict[str, Any]]  # adds what follows from values
    command_line: Callable[[Any], str]

    def read_space(self, path: Path, given: Collection[str]) -> Space:
        """The space in a file, which names none of the options that flags fix. Raises ValueError."""
        return read_space(path, given, self.options, self.may_be_searched, self.check_value)

    def options_of(self, config: Any, space: Space, values: Mapping[str, Any], given: frozenset[str]) -> Any:
        """The options of a trial with these values. Raises ValueError where some exclude others."""
        return replace(config, **self.complete(space, dict(values), given))


def without_given(dimensions: Collection[Dimension], given: Collection[str]) -> Space:
    """A space of those that flags do not fix. Raises ValueError if nothing is left."""
    space = {dimension.name: dimension for dimension in dimensions if dimension.name not in given}
    if not space:
        raise ValueError("nothing is left to search: flags fix every option of the space; drop some, or give --space")
    return space


# -- baseline.py


def scores_may_be_searched(name: str) -> bool:
    """Whether trials with other values of this option can be compared with each other."""
    return name in VIEWS or (OPTIONS[name].metadata["group"] not in COMPARED and name != "select_by")


def with_freezing(config: TrainingConfig, given: frozenset[str]) -> TrainingConfig:
    """The config, partly frozen unless anything was said about what is trained of CLIP."""
    said = set(given) | (set(arguments.load_options(config.config)) if config.config else set())
    other = config.freeze_clip or config.unfreeze_schedule or config.lora_rank or config.preset
    config = config if "partial_freeze" in said or other else replace(config, partial_freeze=True)
    return replace(config, output_dir=None, config=None, preset=None)


def scorer_space(config: TrainingConfig, depth: int | None, given: frozenset[str]) -> Space:
    """The usual options to search, without those that flags fix.

    Args:
        depth: blocks of CLIP's image tower; None if it has none to count.
    """
    low, high = (1e-4, 1e-2) if config.freeze_clip else (1e-6, 1e-3)
    dimensions = [
        Dimension("lr", low=low, high=high, log=True),
        Dimension("residual_scale_q", low=0.1, high=0.5),
        Dimension("residual_scale_c", low=0.1, high=0.5),
    ]
    if not config.use_residual_learning:
        del dimensions[1:]
    if config.partial_freeze and not config.unfreeze_schedule and depth:
        step = 2 if depth >= DEEP else 1
        first, last = round(depth * 16 / 24), round(depth * 22 / 24)
        dimensions.append(
            Dimension("freeze_layers", low=first, high=last, step=step if last > first else None, is_whole=True)
        )
    if not given & {"w_q", "w_c"}:
        dimensions.append(Dimension("w_q", low=0.3, high=0.7))
    dimensions.append(Dimension("batch_size", choices=(16, 32, 64), is_whole=True))
    return without_given(dimensions, given)


def check_scorer_space(space: Space, config: TrainingConfig, given: frozenset[str]) -> None:
    """Raise ValueError for an option that could not change anything, and so would only waste trials."""
    freezing = {"freeze_clip", "partial_freeze", "unfreeze_schedule"} & set(space)
    if "freeze_layers" in space and not freezing and (not config.partial_freeze or config.unfreeze_schedule):
        raise ValueError(f"--space: freeze_layers does nothing here, where CLIP is {config.freezing}; drop it")
    if "head_lr" not in space and "lr" in space and config.freeze_clip and config.head_lr:
        raise ValueError(
            "--space: lr does nothing here, where only heads are trained, with --head_lr; drop one of them"
        )
    if "w_q" in space and "w_c" not in space and "w_c" not in given:
        largest = max(space["w_q"].choices or (space["w_q"].high,))
        if largest > 1:
            raise ValueError(f"--space: w_q: {largest:g} must be at most 1, since w_c is 1 - w_q; or add w_c")


def check_scorer(config: TrainingConfig) -> None:
    """Raise ValueError for options of baseline.py that make several runs."""
    if config.repeats > 1 or (config.kfold and not config.fold):
        raise ValueError("--repeats, --kfold: every trial is one run; --seeds repeats the best one in the end")


def check_text(name: str, value: Any) -> None:
    """Raise ValueError for a loss or a schedule that there is not."""
    if name == "loss":
        parse_loss(str(value))
    if name == "unfreeze_schedule" and value is not None:
        parse_unfreeze_schedule(str(value))


def with_w_c(space: Space, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Values of a trial, with w_c = 1 - w_q unless that is searched or fixed too."""
    if "w_q" in space and "w_c" not in space and "w_c" not in given:
        values["w_c"] = round(1 - values["w_q"], 12)  # 0.7, not 0.7000000000000001
    return values


SCORER = Program(
    script="baseline.py",
    options=OPTIONS,
    not_saved=NOT_SAVED,
    folder="output_dir",
    parser=arguments.build_parser,
    parse_args=arguments.parse_args,
    check=check_scorer,
    of_trials=with_freezing,
    score=lambda config: config.select_by,
    may_be_searched=scores_may_be_searched,
    check_value=check_text,
    check_space=check_scorer_space,
    default_space=scorer_space,
    ready_spaces=lambda config: {},
    complete=with_w_c,
    command_line=command_line,
)


# -- main.py


def is_used(name: str, config: VQAConfig) -> bool:
    """Whether an option changes anything in a run of main.py with these options."""
    owners = [branch for branch, names in BRANCH_OPTIONS.items() if name in names]
    samples = name not in FOLLOWS or (bool(config.use_masking) and config.sampler_type in FOLLOWS[name])
    return samples and (not owners or owners[0] in config.owners)


def answer_dimension(name: str, config: VQAConfig) -> Dimension:
    """The recommended range of an option of main.py."""
    low, high = (OF_DEMO if config.demo else {}).get(name) or recommended(name)
    whole = answering_configs.OPTIONS[name].kind is int
    if name in DOUBLED:
        values = [int(low)]
        while values[-1] < high:
            values.append(2 * values[-1])
        return Dimension(name, choices=tuple(values), is_whole=True)
    if whole:
        return Dimension(name, low=int(low), high=int(high), is_whole=True)
    return Dimension(name, low=low, high=high, log=name in LOGARITHMIC)


def answer_space(config: VQAConfig, depth: int | None, given: frozenset[str]) -> Space:
    """The usual options of main.py to search, by its branches, without those that flags fix."""
    names = [name for branch in ("", *config.owners) for name in USUAL[branch]]
    return without_given([answer_dimension(name, config) for name in names], given)


def experiments(config: VQAConfig) -> dict[str, Space]:
    """The tuning guide's experiments, as far as the branches that are trained use their options."""
    return {
        title: {
            name: Dimension(name, choices=values, is_whole=isinstance(values[0], int))
            for name, values in options.items()
            if is_used(name, config)
        }
        for title, options in EXPERIMENTS.items()
    }


def answers_may_be_searched(name: str) -> bool:
    """Whether trials of main.py with other values of this option can be compared with each other."""
    group = answering_configs.OPTIONS[name].metadata["group"]
    return name in LOOKED_AT or (group not in COMPARED and name not in ("seed", "repeats"))


def check_answer_space(space: Space, config: VQAConfig, given: frozenset[str]) -> None:
    """Raise ValueError for an option that could not change anything, and so would only waste trials."""
    if not {"branches", "sampler_type", "use_masking"} & set(space):
        for name in space:
            if not is_used(name, config):
                how = f"--branches {','.join(config.branch_names)}"
                how += f", --sampler_type {config.sampler_type}" if name in FOLLOWS else ""
                raise ValueError(f"--space: {name} does nothing here, with {how}; drop it")


def check_answers(config: VQAConfig) -> None:
    """Raise ValueError for options of main.py that do not make one run."""
    if config.mode != "train":
        raise ValueError(f"--mode {config.mode}: every trial is trained; drop it")
    if config.repeats > 1:
        raise ValueError("--repeats: every trial is one run; --seeds repeats the best one in the end")


ANSWERER = Program(
    script="main.py",
    options=answering_configs.OPTIONS,
    not_saved=answering_configs.NOT_SAVED,
    folder="output",
    parser=answering_configs.parser,
    parse_args=lambda argv, **late: answering_configs.parse_args(argv),
    check=check_answers,
    of_trials=lambda config, given: replace(config, output=None),
    score=lambda config: "accuracy",
    may_be_searched=answers_may_be_searched,
    check_value=lambda name, value: None,
    check_space=check_answer_space,
    default_space=answer_space,
    ready_spaces=experiments,
    complete=lambda space, values, given: values,
    command_line=answering_configs.command_line,
)
PROGRAMS = {"scorer": SCORER, "vqa": ANSWERER}  # by --program
