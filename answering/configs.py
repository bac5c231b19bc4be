"""Every option of the VQA trainer: one dataclass field each, from which flag, check, help and JSON follow.

No torch here: `python main.py --help` and every mistake in the flags answer at once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.exports import PRECISIONS, check_export
from cli.options import Config, option, options_of, split_list
from cli.parser import OneLineParser, build_parser, flag_words, load_options, parse_flags, refuse_another_run

DATASET_NAMES = ("GQA", "VQA", "csv")
BRANCHES = ("fine", "coarse", "graph")
CLIP = "clip"  # of --features: no files, but the patches of a CLIP
ONE_BY_ONE = ("ask", "export")  # modes that read no fold of questions, and scene graphs only if there are any
MODES = ("train", "evaluate", "predict", "ask", "export")

GROUPS = {
    "data": "questions, answers, and what is known of the images",
    "training": "how long, by which steps, and from which seed",
    "fine": "the branch of bilinear attention (BAN) and attention on attention (AoA)",
    "graph": "the scene-graph branch (ISubGVQA)",
    "coarse": "the branch that sees the whole image (X-VLM, or a CLIP)",
    "fusion": "which branches there are, and what side information weighs",
    "memory": "what trades time for memory",
    "meta": "about the run itself",
}

# What only a branch uses, and "fused" only several together.
BRANCH_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "fine": ("gamma", "use_counter", "AOA_layers", "num_hid", "activation", "omega_q", "omega_v"),
    "graph": (
        *("general_hidden_dim", "mgat_layers", "sampler_type", "sample_k", "nb_samples", "alpha", "beta", "tau"),
        *("use_instruction", "use_masking", "use_mgat"),
    ),
    "coarse": ("coarse",),
    "xvlm": ("xvlm_lr", "checkpoint", "config"),
    "fused": ("fusion_ratio",),
}
# What --demo stands for; flags go above it.
DEMO_SETTINGS: dict[str, Any] = {
    "num_hid": 128,
    "AOA_layers": 1,
    "epochs": 8,
    "batch_size": 64,
    "update_freq": 1,
    "lr": 1e-3,
    "scheduler": "cosine",
    "dropout": 0.2,
    "clip_norm": 5.0,
    "use_counter": True,
    "least_answers": 1,
}

# Facts about a place, not about an experiment: a run that is gone on with may have others.
NOT_SAVED = (
    *("output", "overwrite", "resume", "dry_run", "mode", "image", "question", "answers", "explain", "fold"),
    "precision",
)
# Options that only decide where and how fast something is computed, or what is said and kept of it.
FREE = ("cache_dir", "device", "advice", "report", "tensorboard", "tracker", "save_every_minutes", "keep_states")


@dataclass(frozen=True, kw_only=True)
class VQAConfig(Config):
    """All options of one run of main.py. Construction checks every value and raises ValueError naming the flag."""

    # data
    dataset: str = option("GQA", "data", "the form of the questions", choices=DATASET_NAMES)
    data_root: str | None = option(None, "data", "folder of GQA's or VQA v2's files as downloaded", metavar="DIR")
    data_csv_path: str | None = option(
        None, "data", "with --dataset csv: table with image, question and answer (several as a|b|c)", metavar="FILE"
    )
    features: str | None = option(
        None,
        "data",
        "regions of the images: a folder with gqa_objects_info.json or .npz files, a .hdf5, .tsv or zipped .tsv file; "
        "or clip: the patches of --clip_model",
        metavar="PATH",
    )
    image_base_dir: str | None = option(
        None,
        "data",
        "folder of the images, for the coarse branch, --features clip and the report (default: --data_root)",
        metavar="DIR",
    )
    clip_model: str = option(
        "lite",
        "data",
        "with --features clip and --coarse clip: an open_clip name, local-dir:PATH, hf-hub:ORG/NAME, lite or tiny",
    )
    clip_pretrained: str = option("assets", "data", "its pretrained tag, weights file, or assets (lite, tiny)")
    glove: str | None = option(None, "data", "text file of word vectors to start from", metavar="FILE")
    sg_source: str = option(
        "none",
        "data",
        "scene graphs that words on an image are taken from; gt: people's, which give answers away; predicted",
        choices=("none", "gt", "predicted"),
    )
    scene_graphs: str | None = option(
        None, "data", "folder of their files (default: --data_root, for gt)", metavar="DIR"
    )
    question_len: int = option(12, "data", "words of a question that are read", within="[1, 512]", recommended="8-20")
    max_boxes: int = option(
        50, "data", "regions of an image that are looked at, the first", within="[1, 1000]", recommended="30-100"
    )
    num_stat_word: int = option(30, "data", "words on an image that are read", within="[1, 1000]", recommended="20-50")
    tfidf: bool = option(True, "data", "no second vector for each word, made of the company it keeps")
    least_answers: int | None = option(
        None,
        "data",
        "questions an answer must be given to, to be in the list (default: 9 for VQA, else 1)",
        within="[1, 1000000]",
    )
    val_size: float = option(
        0.1, "data", "share of the training images whose questions choose the epoch", within="(0, 1)"
    )
    test_size: float = option(
        0.2, "data", "share of the images for the test fold, where the data has none with answers", within="(0, 1)"
    )
    bad_images: str = option(
        "error",
        "data",
        "questions on images that --features has not, or cannot read: refuse, or leave them out, which is counted",
        choices=("error", "skip"),
    )
    question_only: bool = option(False, "data", "look at no image: a floor")
    shuffle_images: bool = option(False, "data", "give every question another one's image: a floor")

    # training
    epochs: int = option(20, "training", "passes over the training fold", within="[1, 100000]", recommended="10-50")
    lr: float = option(
        2.8e-4, "training", "learning rate, see --scheduler", within="(0, 1]", recommended="1e-4 to 5e-4"
    )
    batch_size: int = option(32, "training", "questions at once", within="[1, 65536]", recommended="16-64")
    update_freq: int = option(
        4, "training", "batches for one step of the optimiser", within="[1, 65536]", recommended="2-8"
    )
    gradient_accumulation_steps: int = option(
        1, "training", "times so many more", within="[1, 65536]", recommended="1-8"
    )
    clip_norm: float = option(
        0.25, "training", "gradients are cut to this norm; 0 = not", within="[0, 1000000]", recommended="0.1-0.5"
    )
    weight_decay: float = option(0.0, "training", "of AdamW", within="[0, 10]", recommended="0-0.01")
    scheduler: str = option(
        "ban",
        "training",
        "of the learning rate; ban: .5, 1, 1.5, 2 x --lr in epochs 1 to 4, then 2 x, cut to a quarter in epochs "
        "11, 13, 15, 17 and 19; cosine and linear: from --lr to 0 after a warm-up over a tenth of all steps",
        choices=("ban", "cosine", "linear"),
    )
    loss: str = option(
        "bce",
        "training",
        "bce: each answer is right or wrong by itself, summed; ce: one answer is right",
        choices=("bce", "ce"),
    )
    ema_decay: float = option(
        0.0, "training", "evaluate a moving average of the weights; 0 = off", within="[0, 1)", recommended="0.99-0.9999"
    )
    early_stopping_patience: int = option(
        0, "training", "stop after so many epochs without a gain; 0 = never", within="[0, 100000]"
    )
    seed: int = option(1204, "training", "of folds, weights and order", within="[0, 4294967295]")
    repeats: int = option(
        1,
        "training",
        "run so often, with seeds --seed, --seed + 1, ..., each with a validation fold of its own and, where that is "
        "drawn, a test fold",
        within="[1, 1000]",
    )

    # fine
    gamma: int = option(2, "fine", "glimpses of the bilinear attention", within="[1, 64]", recommended="1-4")
    use_counter: bool = option(False, "fine", "count the regions that attention rests on")
    counter_act: str = option("zhang", "fine", "how they are counted", choices=("zhang",))
    AOA_layers: int = option(6, "fine", "layers of attention on attention", within="[0, 64]", recommended="4-8")
    num_hid: int = option(1024, "fine", "joint width", within="[8, 16384]", recommended="512-2048")
    activation: str = option("swish", "fine", "of the answer classifier", choices=("swish", "relu"))
    dropout: float = option(0.45, "fine", "of the answer classifier", within="[0, 1)", recommended="0.3-0.6")

    # graph
    general_hidden_dim: int = option(300, "graph", "width", within="[8, 16384]", recommended="256-512")
    mgat_layers: int = option(4, "graph", "layers, each with an instruction", within="[1, 64]", recommended="2-6")
    sampler_type: str = option(
        "imle", "graph", "how nodes are sampled", choices=("imle", "aimle", "gumbel", "simple", "soft")
    )
    sample_k: int = option(2, "graph", "nodes to keep", within="[1, 1000]", recommended="1-5")
    nb_samples: int = option(1, "graph", "samples that are averaged", within="[1, 1000]", recommended="1-3")
    alpha: float = option(1.0, "graph", "I-MLE: scale of the scores", within="(0, 1000000]", recommended="0.5-2")
    beta: float = option(10.0, "graph", "I-MLE: step to the target", within="(0, 1000000]", recommended="5-20")
    tau: float = option(1.0, "graph", "noise, or temperature", within="(0, 1000000]", recommended="0.5-2")
    use_instruction: int = option(1, "graph", "instructions gate nodes: 1 or 0", within="[0, 1]")
    use_masking: int = option(1, "graph", "nodes are masked: 1 or 0", within="[0, 1]")
    use_mgat: int = option(0, "graph", "every layer masks: 1 or 0", within="[0, 1]")

    # coarse
    coarse: str | None = option(
        None,
        "coarse",
        "what it asks: clip, the frozen CLIP of --clip_model, or xvlm, which needs --checkpoint (default: xvlm where "
        "that is given)",
        choices=("clip", "xvlm"),
    )
    xvlm_lr: float = option(
        5e-5,
        "coarse",
        "learning rate of X-VLM: from this to 0 after a warm-up over a tenth of all steps; 0: frozen, and its answers "
        "are computed once and kept in --cache_dir",
        within="[0, 1]",
        recommended="1e-5 to 1e-4",
    )

    # fusion
    branches: str | None = option(
        None,
        "fusion",
        "which are trained, of fine, coarse and graph (default: fine, with coarse where --checkpoint or --coarse is "
        "given, and graph where --sg_source is)",
        metavar="NAME[,NAME]",
    )
    omega_q: float = option(
        0.1, "fusion", "what named entities weigh in a question at first", within="[0, 10]", recommended="0.05-0.2"
    )
    omega_v: float = option(
        0.01, "fusion", "what words on an image weigh in it at first", within="[0, 10]", recommended="0.005-0.05"
    )
    fusion_ratio: float = option(
        0.1, "fusion", "weight of the loss on the fused answer", within="[0, 1000000]", recommended="0.05-0.2"
    )
    topk: int = option(
        6,
        "fusion",
        "words on an image: so many names, attributes and relations",
        within="[1, 1000]",
        recommended="3-10",
    )

    # memory
    dynamic_batch_size: bool = option(False, "memory", "cut batches where memory runs out; steps stay as large")
    max_memory_usage: float = option(
        0.8,
        "memory",
        "share of a GPU's memory that --dynamic_batch_size plans for",
        within="(0, 1]",
        recommended="0.7-0.9",
    )
    mixed_precision: bool = option(False, "memory", "compute in half precision on a GPU: bf16 or, on old ones, fp16")
    memory_efficient_attention: bool = option(
        False, "memory", "compute attention again in the backward pass instead of keeping what it was computed from"
    )

    # meta
    mode: str = option(
        "train",
        "meta",
        "evaluate, predict: answer the questions of --fold by --checkpoint, and write the official result file; ask: "
        "answer --question about --image; export: write the fine branch as ONNX into --output, a new folder, with an "
        "answer.py that needs no torch, and compare both on questions of the run's test fold",
        choices=MODES,
    )
    checkpoint: str | None = option(
        None,
        "meta",
        "what answers: RUN or RUN/best; in training X-VLM's weights, for the coarse branch",
        metavar="PATH",
    )
    config: str | None = option(None, "meta", "X-VLM's YAML, for the coarse branch", metavar="FILE")
    fold: str = option(
        "val", "meta", "of the official files, for evaluate and predict", choices=("train", "val", "test")
    )
    image: str | None = option(None, "meta", "image to ask about", metavar="FILE")
    question: str | None = option(None, "meta", "what to ask", metavar="TEXT")
    answers: str | None = option(
        None, "meta", "answers to choose among, learned or not, by the coarse branch alone", metavar="A|B|C"
    )
    explain: bool = option(
        False, "meta", "with --mode ask: also print what the answer rests on, and draw it on the image into --output"
    )
    precision: str = option(
        "float32",
        "meta",
        "with --mode export: float16 stores and computes with half the bits, int8 linear layers with a quarter",
        choices=PRECISIONS,
    )
    output: str | None = option(
        None,
        "meta",
        "folder of the run (default: runs/<time>-<data set>-<branches>) or of an export, or file of the answers or the "
        "picture",
        metavar="PATH",
    )
    overwrite: bool = option(False, "meta", "replace what is there")
    resume: str | None = option(None, "meta", "go on with a run that was interrupted", metavar="RUN")
    demo: bool = option(False, "meta", "draw a small set in the form of --dataset; needs neither data nor network")
    dry_run: bool = option(False, "meta", "build everything, print the plan, train nothing")
    test: bool = option(True, "meta", "leave the test fold unread: while settings are still being compared")
    advice: str = option(
        "print", "meta", "compare settings with what usually works; strict: refuse on any remark",
        choices=("print", "strict", "off"),
    )  # fmt: skip
    report: bool = option(True, "meta", "write no report.html")
    tensorboard: bool = option(False, "meta", "also write the scalars of every epoch to RUN/tensorboard")
    tracker: str | None = option(None, "meta", "also send them to this tracker", choices=("wandb", "mlflow"))
    save_every_minutes: float = option(
        5.0, "meta", "save what an interrupted run goes on from; 0 = only when it is stopped", within="[0, 100000]"
    )
    keep_states: int = option(2, "meta", "so many of these are kept", within="[1, 1000]")
    cache_dir: str = option(".cache", "meta", "folder for what is computed once", metavar="DIR")
    device: str = option("auto", "meta", "where to compute", choices=("auto", "cpu", "cuda"))

    @property
    def measured_fold(self) -> str:
        """The fold that a trained model is measured on."""
        return "test" if self.test else "val"

    @property
    def branch_names(self) -> list[str]:
        """The branches to train."""
        if self.branches is not None:
            return split_list(self.branches)
        found = {"fine": True, "coarse": self.checkpoint or self.coarse, "graph": self.sg_source != "none"}
        return ["fine"] if self.question_only else [name for name, is_wanted in found.items() if is_wanted]

    @property
    def asks_xvlm(self) -> bool:
        """Whether X-VLM is trained, or asked, in a run with the coarse branch."""
        return (self.coarse or ("xvlm" if self.checkpoint else "clip")) == "xvlm"

    @property
    def owners(self) -> list[str]:
        """Those keys of BRANCH_OPTIONS whose options this run uses."""
        own = self.branch_names
        asks = "coarse" in own and self.asks_xvlm
        return [*own, *(["fused"] if len(own) > 1 else []), *(["xvlm"] if asks else [])]

    @property
    def batches_per_step(self) -> int:
        """Batches for one step of the optimiser."""
        return self.update_freq * self.gradient_accumulation_steps

    @property
    def num_answered(self) -> int:
        """Questions an answer must be given to, to be in the list."""
        return self.least_answers or (9 if self.dataset == "VQA" else 1)

    @property
    def amp(self) -> str:
        """Precision, as `training.devices` names it."""
        return "auto" if self.mixed_precision else "off"

    def check_together(self) -> None:
        """Rules between options. Raises ValueError."""
        if self.mode == "train":
            check_training(self)
        else:
            check_answering(self)
        if self.explain and self.mode != "ask":
            raise ValueError("--explain: belongs to --mode ask")
        if self.precision != "float32" and self.mode != "export":
            raise ValueError(f"--precision {self.precision}: belongs to --mode export")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite starts again: drop one")
        if self.sg_source == "predicted" and not (self.scene_graphs or self.demo) and self.mode not in ONE_BY_ONE:
            raise ValueError("--sg_source predicted: needs --scene_graphs, the folder of their files")
        if self.scene_graphs and self.sg_source == "none":
            raise ValueError("--scene_graphs: say by --sg_source whether they are gt (people's) or predicted")


def check_training(config: VQAConfig) -> None:
    """Rules between the options of a run. Raises ValueError."""
    for name in config.branch_names:
        if name not in BRANCHES:
            raise ValueError(f"--branches {config.branches}: {name!r} is none of {', '.join(BRANCHES)}")
    if not config.branch_names:
        raise ValueError(f"--branches: names none of {', '.join(BRANCHES)}")
    if len(set(config.branch_names)) < len(config.branch_names):
        raise ValueError(f"--branches {config.branches}: names one twice")
    if "graph" in config.branch_names and config.sg_source == "none":
        raise ValueError("--branches graph: reads scene graphs; say by --sg_source gt or predicted where they are from")
    for name in ("coarse", "graph"):
        if name in config.branch_names and config.question_only:
            raise ValueError(f"--question_only looks at no image: drop it, or the {name} branch")
    if "coarse" in config.branch_names:
        check_coarse(config)
    given = config.data_csv_path if config.dataset == "csv" else config.data_root
    flag = "--data_csv_path FILE" if config.dataset == "csv" else "--data_root DIR"
    other = config.data_root if config.dataset == "csv" else config.data_csv_path
    if config.demo and config.dataset == "csv":
        raise ValueError("--demo draws a set in the form of GQA or VQA: name one of them by --dataset")
    if not config.demo and not given:
        raise ValueError(f"{flag}: say where the questions are, or try --demo")
    if other:
        wrong = "--data_root" if config.dataset == "csv" else "--data_csv_path"
        raise ValueError(f"{wrong} does not go with --dataset {config.dataset}: drop it, or name it by {flag}")
    if config.question_only and config.shuffle_images:
        raise ValueError("--question_only looks at no image, so there is none to shuffle: drop one of the two")
    if config.question_only and config.features:
        raise ValueError("--question_only looks at no image: drop it, or --features")
    if "fine" in config.branch_names and not (config.features or config.question_only or config.demo):
        raise ValueError("--features PATH or --features clip: say what is known of images, or take --question_only")
    if config.val_size + config.test_size >= 1:
        raise ValueError(f"--val_size {config.val_size} --test_size {config.test_size}: must leave a training fold")
    if config.repeats > 1 and not config.test:
        raise ValueError("--no_test: --repeats is for measuring on test folds; drop one of the two")
    for flag, path in (("--checkpoint", config.checkpoint), ("--config", config.config)):
        if path and not Path(path).exists():
            raise ValueError(f"{flag} {path}: there is no such file (X-VLM's, for the coarse branch)")
    for flag, value in (("--image", config.image), ("--question", config.question), ("--answers", config.answers)):
        if value:
            raise ValueError(f"{flag}: belongs to --mode ask")


def check_coarse(config: VQAConfig) -> None:
    """Rules of the coarse branch. Raises ValueError."""
    if config.asks_xvlm and not config.checkpoint:
        raise ValueError("--coarse xvlm: needs --checkpoint FILE, X-VLM's weights")
    if config.coarse == "clip" and config.checkpoint:
        raise ValueError("--coarse clip asks a CLIP, not the X-VLM of --checkpoint: drop one of the two")
    if config.config and not config.checkpoint:
        raise ValueError("--config FILE: belongs to X-VLM's --checkpoint FILE; name that too")
    if config.asks_xvlm and config.xvlm_lr == 0 and config.branch_names == ["coarse"]:
        raise ValueError("--xvlm_lr 0: leaves nothing to train in --branches coarse; add a branch, or raise it")


def check_answering(config: VQAConfig) -> None:
    """Rules between the options of --mode evaluate, predict and ask. Raises ValueError."""
    if not config.checkpoint:
        raise ValueError(f"--mode {config.mode}: needs --checkpoint RUN/best, the run that answers")
    if config.mode == "ask":
        for flag, value in (("--image FILE", config.image), ("--question TEXT", config.question)):
            if not value:
                raise ValueError(f"--mode ask: needs {flag}")
        if config.answers and config.explain:
            raise ValueError("--answers: by the coarse branch alone, which looks at no region: drop --explain")
        if config.output and config.explain and Path(config.output).suffix.lower() != ".png":
            raise ValueError(f"--output {config.output}: --explain draws a PNG; name a file that ends in .png")
        if config.output and not config.explain:
            raise ValueError(f"--output {config.output}: --mode ask writes only what --explain draws; add it")
    elif config.mode == "export":
        check_exporting(config)
    elif not (config.data_csv_path if config.dataset == "csv" else config.data_root):
        flag = "--data_csv_path" if config.dataset == "csv" else "--data_root"
        raise ValueError(f"--mode {config.mode}: needs {flag}, where the questions are")
    for name in ("resume", "demo", "dry_run"):
        if getattr(config, name):
            raise ValueError(f"--{name}: belongs to training; drop it, or --mode {config.mode}")
    if config.repeats > 1:
        raise ValueError(f"--repeats {config.repeats}: belongs to training; drop it, or --mode {config.mode}")


def check_exporting(config: VQAConfig) -> None:
    """Rules between the options of --mode export. Raises ValueError."""
    if not config.output:
        raise ValueError("--mode export: needs --output DIR, a new folder")
    for flag, value in (("--image", config.image), ("--question", config.question), ("--answers", config.answers)):
        if value:
            raise ValueError(f"{flag}: belongs to --mode ask")
    check_export("--mode export", "--output", config.output, config.device)


OPTIONS = options_of(VQAConfig)


def recommended(name: str) -> tuple[float, float]:
    """The ends of an option's recommended range, as its help says it."""
    low, high = re.split(r" to |(?<=\d)-(?=\d)", OPTIONS[name].metadata["recommended"])
    return float(low), float(high)


def command_line(config: VQAConfig) -> str:
    """The shell command that runs main.py with these options, but for what belongs to one place (NOT_SAVED)."""
    values = {name: value for name, value in vars(config).items() if name not in NOT_SAVED}
    base = {**(DEMO_SETTINGS if config.demo else {}), "demo": False}
    return " ".join(["python main.py", *map(shlex.quote, flag_words(values, OPTIONS, base))])


def parser() -> OneLineParser:
    """The command line of main.py."""
    return build_parser(
        VQAConfig,
        GROUPS,
        prog="main.py",
        usage="python main.py [flags]",
        description="Train a model that answers questions about images, measure it, and ask it.",
        epilog="Try it now: python main.py --demo",
    )


def parse_args(argv: Sequence[str] | None = None) -> VQAConfig:
    """Command line -> options. Precedence: flags, then what --demo or the run of --resume stands for, then defaults.

    Raises:
        ValueError: an unknown flag, or a value that breaks its rule.
        SystemExit: --help has printed what was asked for.
    """
    flags = parse_flags(parser(), argv)
    if "resume" in flags:
        OPTIONS["resume"].check(flags["resume"])
        return resumed_config(flags)
    for name in ("data_root", "data_csv_path"):
        if flags.get("demo") and name in flags:
            raise ValueError(f"--demo draws its own data: drop it, or --{name}")
    return VQAConfig(**{**(DEMO_SETTINGS if flags.get("demo") else {}), **flags})


def resumed_config(flags: Mapping[str, Any]) -> VQAConfig:
    """The options of the run or runs to be gone on with; flags may change those in FREE. Raises ValueError."""
    folder = Path(flags["resume"])
    files = [folder / name for name in ("config.json", "protocol.json") if (folder / name).is_file()]
    if not files:
        raise ValueError(f"--resume {folder}: there is no run in it")
    saved = load_options(files[0], OPTIONS, not_saved=NOT_SAVED, flag="--resume")
    refuse_another_run(folder, flags, saved, OPTIONS, free=FREE, instead="start a new one")
    return VQAConfig(**{**saved, **flags, "output": str(folder)})
