"""Answer questions with the model in this folder: python answer.py --image IMAGE --question "What is it?"."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime

UNKNOWN = 1  # the number of every word that is not in the vocabulary
NAMES = (("features", "x"), ("boxes", "bbox"), ("width", "image_w"), ("height", "image_h"))  # that each part goes by


def read_regions(path):
    """(K, F) features and (K, 4) boxes, x1 y1 x2 y2 as shares of width and height, from the .npz file of an image."""
    with np.load(path) as found:
        parts = [next((found[name] for name in names if name in found), None) for names in NAMES]
    assert parts[0] is not None and parts[1] is not None, "has no arrays `features` and `boxes`"
    size = [1, 1] if parts[2] is None or parts[3] is None else parts[2:]
    features, boxes = np.float32(parts[0]), np.float32(parts[1]) / np.float32([*size, *size])
    assert features.ndim == 2 and boxes.shape == (len(features), 4), f"{features.shape} features, {boxes.shape} boxes"
    assert np.isfinite(features).all(), "holds numbers that are not finite"
    assert ((boxes >= -0.02) & (boxes <= 1.02)).all() and (boxes[:, 2:] >= boxes[:, :2]).all(), "has impossible boxes"
    return features, boxes.clip(0, 1)


class Answerer:
    def __init__(self, folder, providers=("CPUExecutionProvider",)):
        self.folder, self.providers = Path(folder), list(providers)
        texts = ((self.folder / f"{name}.json").read_text(encoding="utf-8") for name in ("preprocess", "vocabulary"))
        self.config, vocabulary = map(json.loads, texts)
        self.answers, self.entities = vocabulary["answers"], set(vocabulary["entities"])
        self.number_of = {word: number for number, word in enumerate(vocabulary["words"])}
        self.session = self.open("answers.onnx")
        if self.config["views"]:
            import pixels  # beside this file; needs Pillow

            self.pixels, self.encoder = pixels, self.open("regions.onnx")

    def open(self, name):
        return onnxruntime.InferenceSession(self.folder / name, providers=self.providers, **self.config["session"])

    def look(self, path):
        """(K, F) features and (K, 4) boxes of an image's regions, from its pixels or from a file that has them."""
        if not self.config["views"]:
            return read_regions(path)
        decoded = self.pixels.decode(path, **self.config["decode"])
        views = self.pixels.take_views(decoded, **self.config["views"])
        return self.encoder.run(None, {"pixels": views})[0][0], np.float32(self.config["boxes"])

    def words(self, text):
        return re.findall(self.config["question"]["pattern"], text.lower())

    def numbers(self, rows, most):
        """(n, words of the longest) numbers of the first words of each row, 0 where there are no more."""
        found = [[self.number_of.get(word, UNKNOWN) for word in row[:most]] for row in rows]
        longest = max(1, *map(len, found))
        return np.array([row + [0] * (longest - len(row)) for row in found], dtype=np.int64)

    def answer(self, questions, images=(), described=()):
        """How likely each of `answers` is right: (questions, answers).

        images: what `look` gives for the image of each question, best once for each image.
        described: words on the image of each question, where scene graphs were read in training.
        """
        most, rows = self.config["question"], [self.words(text) for text in questions]
        entities = [[word for word in row if word in self.entities] for row in rows]
        feed = {"words": self.numbers(rows, most["words"]), "entities": self.numbers(entities, most["entities"])}
        if looked := self.config["regions"]:
            seen = {id(image): image for image in images}
            feed["image_of_question"] = np.array([list(seen).index(id(image)) for image in images])
            longest = max(1, *(len(boxes[: looked["most"]]) for _, boxes in seen.values()))
            for part, name, width in ((0, "features", looked["width"]), (1, "boxes", 4)):
                feed[name] = np.zeros((len(seen), longest, width), dtype=np.float32)
                for row, image in zip(feed[name], seen.values(), strict=True):
                    row[: len(image[part])] = image[part][:longest]
            if looked["described"]:
                told = dict(zip(map(id, images), described, strict=False))
                feed["description"] = self.numbers([self.words(told.get(key, "")) for key in seen], looked["described"])
        return self.session.run(None, feed)[0]


if __name__ == "__main__":
    answerer = Answerer(Path(__file__).parent)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--question", required=True)
    if looked := answerer.config["regions"]:
        parser.add_argument("--image", required=True, help="a file of it" if answerer.config["views"] else "its .npz")
        if looked["described"]:
            parser.add_argument("--described", default="", help="words on the image, in the order of preprocess.json")
    args = {"image": None, "described": "", **vars(parser.parse_args())}
    try:
        images = [answerer.look(args["image"])] if looked else []
        chances = answerer.answer([args["question"]], images, [args["described"]])[0]
    except Exception as error:  # noqa: BLE001  Pillow raises almost anything
        parser.exit(2, f"error: {args['image']}: {error}\n")
    for number in np.argsort(-chances)[:5]:
        print(f"{chances[number]:6.3f}  {answerer.answers[number]}")
