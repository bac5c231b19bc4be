"""An epoch of main.py's fine branch against a plain loop: same questions, features, model and optimiser, as a table.

    python bench/vqa_speed.py
    python bench/vqa_speed.py --num_hid 512 --num_images 4000

The plain loop does what public code does: all features in memory, a tensor for each sample, every question padded to
--question_len words and every image to --max_boxes regions, each question with an image of its own, the optimiser as
torch builds it unasked. Both pass over 20,000 drawn questions in
batches of 32 with a step after each; each is a process of its own, whose peak memory is told. Times are those of the
epoch alone, plus, for the plain loop, of reading the features, which ours reads meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from answering import task  # noqa: E402
from answering.configs import VQAConfig  # noqa: E402
from answering.experiment import Experiment, build_experiment  # noqa: E402
from storage.json_files import write_json  # noqa: E402
from training import devices, loop  # noqa: E402

WIDTH = 2048  # of a region's features, as bottom-up attention has
SHORTEST, LONGEST = 3, 12  # words of a question
FEWEST, MOST = 10, 50  # regions of an image
NUM_WORDS, NUM_ANSWERS = 3000, 1500
MOST_OBJECTS = 8  # of a scene graph


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_questions", type=int, default=20_000, help="(default: 20,000)")
    parser.add_argument("--num_images", type=int, nargs="+", default=[1000, 3000], help="(default: 1,000 and 3,000)")
    parser.add_argument("--num_hid", type=int, default=256, help="(default: 256)")
    parser.add_argument("--AOA_layers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run is not None:
        print(json.dumps(run(args, *args.run)))
        return
    print("| images | ours s | ours peak GB | plain s | plain peak GB | plain / ours |\n|---|---|---|---|---|---|")
    for num_images in args.num_images:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), args.num_questions, num_images)
            flags = [f"--num_hid={args.num_hid}", f"--AOA_layers={args.AOA_layers}", f"--device={args.device}"]
            ours, plain = (in_process(flags, side, folder) for side in ("ours", "plain"))
        if abs(ours["loss"] - plain["loss"]) > 0.02 * plain["loss"]:
            raise SystemExit(f"the two do not compute the same: mean losses {ours['loss']} and {plain['loss']}")
        cells = (f"{side['seconds']:.1f} | {side['peak_gb']:.2f}" for side in (ours, plain))
        print(f"| {num_images:,} | {' | '.join(cells)} | **{plain['seconds'] / ours['seconds']:.2f}** |", flush=True)


def in_process(flags: list[str], side: str, folder: str) -> dict[str, Any]:
    """Run one side by itself."""
    command = [sys.executable, __file__, *flags, "--run", side, folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def draw(folder: Path, num_questions: int, num_images: int) -> None:
    """Write questions and features in GQA's form: nonsense of the sizes that real ones have."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, num_questions)
    records = {
        str(number): {
            "question": " ".join(f"w{word}" for word in draw.integers(NUM_WORDS, size=length)),
            "imageId": str(draw.integers(num_images)),
            "isBalanced": True,
            "answer": f"a{int(NUM_ANSWERS * draw.random() ** 2)}",
            "groups": {"global": None, "local": ""},
            "entailed": [],
            "types": {"structural": "query", "semantic": "obj", "detailed": ""},
            "semantic": [],
        }
        for number, length in enumerate(lengths)
    }
    write_json(folder / "train_balanced_questions.json", records)
    write_json(folder / "train_sceneGraphs.json", {str(image): drawn_graph(draw) for image in range(num_images)})
    counts = draw.integers(FEWEST, MOST + 1, num_images)
    with h5py.File(folder / "gqa_objects_0.h5", "w") as file:
        features = file.create_dataset("features", (num_images, 100, WIDTH), dtype="f2")
        boxes = file.create_dataset("bboxes", (num_images, 100, 4), dtype="f4")
        for image, count in enumerate(counts):
            features[image, :count] = draw.random((count, WIDTH), dtype=np.float32)
            corners = np.sort(draw.integers(0, 640, (count, 2, 2)), axis=1)
            boxes[image, :count] = corners.reshape(count, 4)
    info = {
        str(image): {"file": 0, "idx": image, "objectsNum": int(count), "width": 640, "height": 640}
        for image, count in enumerate(counts)
    }
    write_json(folder / "gqa_objects_info.json", info)


def drawn_graph(draw: np.random.Generator) -> dict[str, Any]:
    """A scene graph, from which words on the image are taken."""
    words = draw.integers(NUM_WORDS, size=(MOST_OBJECTS, 3))
    named = [[f"w{word}" for word in row] for row in words[: draw.integers(3, MOST_OBJECTS + 1)]]
    box = {"x": 0, "y": 0, "w": 1, "h": 1}
    return {
        "objects": {
            str(place): {
                "name": name,
                **box,
                "attributes": [attribute],
                "relations": [{"name": relation, "object": "0"}],
            }
            for place, (name, attribute, relation) in enumerate(named)
        }
    }


def run(args: argparse.Namespace, side: str, folder: str) -> dict[str, float]:
    """One epoch of one side: seconds, mean loss, and the most memory."""
    config = VQAConfig(
        data_root=folder,
        features=folder,
        branches="fine",
        sg_source="predicted",
        scene_graphs=folder,
        num_hid=args.num_hid,
        AOA_layers=args.AOA_layers,
        update_freq=1,
        val_size=0.01,
        test_size=0.01,
        dropout=0.0,
    )
    if side == "ours":
        devices.recycle_memory(args.device)  # as main.py does
    experiment = build_experiment(config, devices.start_runtime(args.device, "off"))
    state = task.build_train_state(experiment)
    started = time.perf_counter()
    if side == "ours":
        answers = task.AnswerTask(experiment)
        loss = loop.train_epoch(
            experiment.model,
            answers.batches(1, 0),
            answers.compute_losses,
            optimizer=state.optimizer,
            schedule=state.schedule,
            runtime=experiment.runtime,
            average=state.average,
            micro=state.micro,
            max_grad_norm=config.clip_norm,
        )["loss"]
    else:
        loss = plain_epoch(experiment, torch.optim.AdamW(plain_groups(state.optimizer)))
    seconds = time.perf_counter() - started
    peak = experiment.runtime.peak_memory() / 1e9 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": seconds, "loss": loss, "peak_gb": peak}  # of the GPU, or of the process


def plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The same parameters, rates and decays."""
    kept = ("params", "lr", "weight_decay", "betas", "eps")
    return [{name: group[name] for name in kept} for group in optimizer.param_groups]


class Samples(Dataset):
    """A tensor for each sample, padded to the longest there may be."""

    def __init__(self, experiment: Experiment) -> None:
        self.table = experiment.folds["train"].table
        self.config = experiment.config
        assert experiment.regions is not None
        names = sorted(experiment.regions.ids)
        self.place = {name: place for place, name in enumerate(names)}
        self.features = torch.zeros(len(names), self.config.max_boxes, WIDTH)
        self.boxes = torch.zeros(len(names), self.config.max_boxes, 4)
        for name, place in self.place.items():
            found = experiment.regions.read(name)
            count = min(len(found.boxes), self.config.max_boxes)
            self.features[place, :count] = torch.from_numpy(found.features[:count])
            self.boxes[place, :count] = torch.from_numpy(found.boxes[:count])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, ...]:
        place = self.place[self.table.images[row]]
        words = torch.zeros(self.config.num_stat_word, dtype=torch.int32)
        known = torch.from_numpy(self.table.descriptions[self.table.images[row]])
        words[: len(known)] = known
        assert self.table.targets_QA is not None
        return (
            torch.from_numpy(self.table.words_QN[row]),
            torch.from_numpy(self.table.entities_QE[row]),
            self.features[place],
            self.boxes[place],
            words,
            torch.from_numpy(self.table.targets_QA[[row]].toarray()[0]),
        )


def plain_epoch(experiment: Experiment, optimizer: torch.optim.Optimizer) -> float:
    """The epoch as public code has it; returns the mean loss."""
    config, model = experiment.config, experiment.model.branches["fine"].train()
    order = torch.Generator().manual_seed(config.seed)
    samples = Samples(experiment)
    total = 0.0
    for batch in DataLoader(samples, config.batch_size, shuffle=True, generator=order):
        *inputs, targets = (part.to(experiment.runtime.device) for part in batch)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(*inputs), targets, reduction="sum")
        (loss / len(targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss.detach())
    return total / len(samples)


if __name__ == "__main__":
    main()
