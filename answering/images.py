"""What is known of images: their regions, from files or from CLIP; what the coarse branch sees of them; their scene
graphs; and where they lie.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from answering.configs import CLIP, VQAConfig
from backbones.download import download
from backbones.loading import load_backbone
from branches.coarse import ClipBranch, XvlmBranch
from branches.xvlm import Tokenizer, XvlmConfig, read_config
from inputs import frozen_cache
from regions.clip_regions import PatchRegions
from regions.demo_set import find_demo_set
from regions.features import RegionFiles, open_features
from regions.whole_images import (
    ClipEmbeddings,
    CoarseInputs,
    EmbeddedQuestions,
    Pixels,
    WordedQuestions,
    rank_once,
)
from storage.atomic import atomic_write
from storage.feature_cache import FeatureCache, key_of
from storage.image_files import try_images
from storage.messages import first_five, one_line
from training.devices import Runtime
from vqa.drawn import PREDICTED
from vqa.preprocess import QuestionTable, SceneGraphs, read_scene_graphs
from vqa.questions import Questions, plain_id

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
RANKED_AT_ONCE = 16  # questions to a frozen X-VLM
MOST_CACHE = 100e9  # bytes of regions, of all runs that share --cache_dir


def open_regions(config: VQAConfig, runtime: Runtime) -> RegionFiles | None:
    """The regions that --features names; None if no image is looked at. Raises ValueError."""
    if config.question_only or config.features is None:
        return None
    if config.features != CLIP:
        return open_features(Path(config.features), lambda path: unpacked(path, Path(config.cache_dir)))
    return clip_regions(config, runtime, index_images(config))


def clip_regions(config: VQAConfig, runtime: Runtime, paths: Mapping[str, Path]) -> PatchRegions:
    """The patches of --clip_model as regions of these images. Raises ValueError."""
    backbone = load_backbone(config.clip_model, config.clip_pretrained)
    cache = FeatureCache(Path(config.cache_dir) / "regions", MOST_CACHE)
    return PatchRegions(backbone, runtime, readable_images(config, runtime, paths), cache, most=config.max_boxes)


def readable(paths: Mapping[str, Path], runtime: Runtime) -> dict[str, Path]:
    """The images that can be read; says how many cannot, and why."""
    results = try_images(list(paths.values()), num_threads=runtime.num_threads)
    found = {name: paths[name] for name, item in zip(paths, results, strict=True) if not isinstance(item, str)}
    if broken := [f"{name} ({item})" for name, item in zip(paths, results, strict=True) if isinstance(item, str)]:
        runtime.say(f"note      {len(broken)} of {len(paths)} images cannot be read: {first_five(broken)}")
    return found


def prepare(known: RegionFiles | None, coarse: Coarse | None, questions: Iterable[Questions]) -> None:
    """Look at all images that are asked about, as far as no files have what is to be known of them."""
    images = list(dict.fromkeys(image for fold in questions for image in fold.images))
    if isinstance(known, PatchRegions):
        known.fill(images)
    if coarse is not None:
        coarse.images.fill(images)


def usable(known: RegionFiles | None, coarse: Coarse | None) -> Collection[str] | None:
    """The images that all can be known of that branches look at; None if none looks at any."""
    seen = [each.ids for each in (known, None if coarse is None else coarse.images) if each is not None]
    return set(seen[0]).intersection(*seen[1:]) if len(seen) > 1 else seen[0] if seen else None


@dataclass
class Coarse:
    """What the coarse branch is given: whole images, and questions as it reads them."""

    images: ClipEmbeddings | Pixels
    xvlm: XvlmConfig | None = None
    tokenizer: Tokenizer | None = None  # X-VLM's
    frozen: XvlmBranch | None = None  # an X-VLM that is asked once
    caching: frozen_cache.Caching | None = None  # where its answers are kept

    def inputs(self, texts: Sequence[str], table: QuestionTable, answers: Sequence[str]) -> CoarseInputs:
        """What is read of the questions of a table, which are these texts. Raises ValueError if there is no room."""
        if isinstance(self.images, ClipEmbeddings):
            return EmbeddedQuestions(self.images, *self.images.embed(texts))
        assert self.xvlm is not None and self.tokenizer is not None
        questions_QL, answers_AT = self.tokenizer.questions(texts, self.xvlm.max_tokens), self.tokens(answers)
        asked = WordedQuestions(self.images, questions_QL.numpy(), answers_AT.numpy(), table.targets_QA)
        if self.frozen is None:
            return asked
        assert self.caching is not None
        return rank_once(
            asked,
            table.images,
            self.frozen.eval().rank,
            self.caching,
            min(self.xvlm.k_test, len(answers)),
            weights=self.fingerprint,
            config=asdict(self.xvlm),
            ranking=frozen_cache.digest_of_code("branches/bert.py", "branches/coarse.py", "branches/xvlm.py"),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of the frozen X-VLM, the answers that it chooses among included."""
        assert self.frozen is not None
        return frozen_cache.fingerprint_of(self.frozen.state_dict())

    def tokens(self, answers: Sequence[str]) -> Tensor:
        """(A, T) tokens of answers, as X-VLM reads them."""
        assert self.tokenizer is not None
        return self.tokenizer.answers(answers)

    def let_choose(self, branch: ClipBranch | XvlmBranch, answers: Sequence[str]) -> None:
        """Let the branch answer by one of these, whether it has learned them or not."""
        if isinstance(branch, XvlmBranch):
            branch.choose_among(self.tokens(answers))
            return
        branch.choose_among(self.embedded(answers))

    def embedded(self, answers: Sequence[str]) -> Tensor:
        """(A, E) embeddings of answers by the CLIP."""
        assert isinstance(self.images, ClipEmbeddings)
        found_UE, place_A = self.images.embed(answers)
        return found_UE[place_A]


def open_coarse(config: VQAConfig, runtime: Runtime, paths: Mapping[str, Path] | None = None) -> Coarse | None:
    """What the coarse branch sees in training; None if there is none. Raises ValueError.

    Args:
        paths: image -> its file; None: those of the options.
    """
    if "coarse" not in config.branch_names:
        return None
    if not config.asks_xvlm:
        return clip_coarse(config, runtime, paths)
    weights, options = Path(str(config.checkpoint)), None if config.config is None else Path(config.config)
    if not weights.is_file():
        raise ValueError(f"--checkpoint {weights}: is no file (X-VLM's weights, for the coarse branch)")
    xvlm = XvlmConfig() if options is None else read_config(options)
    tokenizer = Tokenizer(find_vocabulary(xvlm.text_encoder, weights, options))
    return xvlm_coarse(config, runtime, xvlm, tokenizer, paths)


def clip_coarse(config: VQAConfig, runtime: Runtime, paths: Mapping[str, Path] | None) -> Coarse:
    """The CLIP of --clip_model; see `open_coarse`."""
    backbone = load_backbone(config.clip_model, config.clip_pretrained)
    cache = FeatureCache(Path(config.cache_dir) / "regions", MOST_CACHE)
    return Coarse(ClipEmbeddings(backbone, runtime, readable_images(config, runtime, paths), cache))


def xvlm_coarse(
    config: VQAConfig, runtime: Runtime, xvlm: XvlmConfig, tokenizer: Tokenizer, paths: Mapping[str, Path] | None
) -> Coarse:
    """An X-VLM; see `open_coarse`."""
    if len(tokenizer.words) > xvlm.text.vocab_size:
        raise ValueError(
            f"BERT's vocabulary has {len(tokenizer.words):,} words, X-VLM's config {xvlm.text.vocab_size:,} "
            "(vocab_size): they do not belong together"
        )
    pixels = Pixels(readable_images(config, runtime, paths), xvlm.vision.image_res, runtime)
    cache = FeatureCache(Path(config.cache_dir) / "regions", MOST_CACHE)
    return Coarse(pixels, xvlm, tokenizer, caching=frozen_cache.build_caching({}, runtime, cache, RANKED_AT_ONCE))


def readable_images(config: VQAConfig, runtime: Runtime, paths: Mapping[str, Path] | None) -> Mapping[str, Path]:
    """Those of all images that are to be used."""
    paths = index_images(config) if paths is None else paths
    return readable(paths, runtime) if config.bad_images == "skip" else paths


def find_vocabulary(name: str, weights: Path, options: Path | None) -> Path:
    """The vocabulary that X-VLM's YAML names as `text_encoder`: from the hub, if it is nowhere near. Raises ValueError.

    Looked for from here, from the folders of the YAML and above it, and beside the weights.
    """
    around = [] if options is None else [options.parent, *list(options.absolute().parents)[1:3]]
    places = [Path(name), *(folder / name for folder in around), weights.parent / Path(name).name, weights.parent]
    for place in places:
        if place.is_file() or (place / "vocab.txt").is_file():
            return place
    ways = f"Put vocab.txt of bert-base-uncased into {weights.parent}, or into the folder that text_encoder names"
    return Path(download("BERT's vocabulary", lambda: hf_hub_download("bert-base-uncased", "vocab.txt"), ways))


def unpacked(path: Path, cache: Path) -> Path:
    """The TSV file in a ZIP file, unpacked into the cache folder once. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".tsv")]
            if len(names) != 1:
                raise ValueError(f"--features {path}: holds {len(names)} .tsv files; unpack it, and name one")
            info = archive.getinfo(names[0])
            target = cache / "unpacked" / f"{key_of(path.resolve(), info.CRC, info.file_size)[:32]}.tsv"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)

                def fill(temporary: Path) -> None:
                    with archive.open(info) as source, temporary.open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)

                atomic_write(target, fill)
            return target
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"--features {path}: cannot be unpacked ({one_line(error)})") from None


def image_folder(config: VQAConfig) -> Path | None:
    """Where the images should lie; None if nobody has said."""
    folder = config.image_base_dir or config.data_root
    if folder is None and config.data_csv_path is not None:
        return Path(config.data_csv_path).parent
    return None if folder is None else Path(folder)


def index_images(config: VQAConfig) -> dict[str, Path]:
    """Each image in the folder and the folders in it, by the id that questions have. Raises ValueError."""
    folder = image_folder(config)
    if folder is None or not folder.is_dir():
        raise ValueError(f"--image_base_dir {folder}: is no folder")
    found = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix.lower() in SUFFIXES)
    if config.dataset == "csv":
        return {path.relative_to(folder).as_posix(): path for path in found}
    return {plain_id(path.name): path for path in found}


def find_images(config: VQAConfig, names: Sequence[str]) -> dict[str, Path]:
    """The files of some images, as far as they are there."""
    folder = image_folder(config)
    if folder is None or not folder.is_dir():
        return {}
    known = index_images(config)
    return {name: known[name] for name in names if name in known}


def read_graphs(config: VQAConfig) -> SceneGraphs:
    """The scene graphs that --sg_source names; none without it. Raises ValueError."""
    if config.sg_source == "none":
        return {}
    root = Path(str(config.scene_graphs or config.data_root))
    tiers = graph_files(root)
    if not tiers:
        raise ValueError(f"--sg_source {config.sg_source}: {root} holds no *sceneGraphs.json")
    return read_scene_graphs(tiers)


def graph_files(root: Path) -> list[Path]:
    """The files of scene graphs in a folder, as GQA's are named."""
    return [path for folder in (root, root / "sceneGraphs") for path in sorted(folder.glob("*sceneGraphs.json"))]


def read_true_graphs(config: VQAConfig, names: Collection[str]) -> SceneGraphs:
    """People's scene graphs of some images, as far as --data_root has them, whatever a model reads.

    Only as many files are read as hold these images, "val" before "train", which is far larger. Raises ValueError.
    """
    predicted = graph_files(Path(config.scene_graphs).resolve()) if config.scene_graphs else []
    files = set(graph_files(Path(str(config.data_root)).resolve())) - set(predicted)
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(files, key=lambda path: path.name, reverse=True):
        graphs = read_scene_graphs([path])
        found |= {name: graphs[name] for name in names if name in graphs}
        if len(found) == len(names):
            break
    return found


def graph_notes(config: VQAConfig) -> list[str]:
    """What is to be said beside every number that scene graphs have gone into."""
    if config.sg_source == "gt":
        return ["--sg_source gt: people drew these scene graphs, which give answers away; no test image has any"]
    return []


def absent_graph_notes(config: VQAConfig, folds: Iterable[Questions], graphs: SceneGraphs) -> list[str]:
    """How many questions are about images without a scene graph, where a run reads any."""
    if config.sg_source == "none":
        return []
    asked = [plain_id(image) for questions in folds for image in questions.images]
    absent = [image for image in asked if image not in graphs]
    told = first_five(list(dict.fromkeys(absent)))
    return (
        [f"{len(absent):,} of {len(asked):,} questions are about images without a scene graph: {told}"]
        if absent
        else []
    )


def without_demo_paths(config: VQAConfig) -> VQAConfig:
    """The options of a run on the drawn set as they were given; of any other run, as they are."""
    if not config.demo:
        return config
    features = config.features if config.features == CLIP else None
    return replace(config, data_root=None, features=features, scene_graphs=None)


def find_demo(config: VQAConfig, runtime: Runtime) -> VQAConfig:
    """The options with the paths to the drawn set, which is drawn if it is not there yet. Raises ValueError."""
    folder, features = find_demo_set(Path(config.cache_dir), config.dataset, runtime)
    looked_at: str | None = config.features or str(features)
    if config.question_only or "fine" not in config.branch_names:
        looked_at = None
    graphs = config.scene_graphs or (str(folder / PREDICTED) if config.sg_source == "predicted" else None)
    return replace(config, data_root=str(folder), features=looked_at, scene_graphs=graphs)
