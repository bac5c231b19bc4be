"""Score images in MOS units with the model in this folder: python score.py a.png b.png --prompt "a red circle"."""

import argparse
import html
import json
from pathlib import Path

import numpy as np
import onnxruntime
from pixels import decode, take_views  # beside this file
from tokenizers import Tokenizer


class Scorer:
    def __init__(self, folder, providers=("CPUExecutionProvider",)):
        config, graph, words = (Path(folder, name) for name in ("preprocess.json", "scorer.onnx", "tokenizer.json"))
        self.config = json.loads(config.read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(graph, providers=list(providers), **self.config["session"])
        self.tokenizer = self.config["text"] and Tokenizer.from_file(str(words))

    def score(self, paths, prompts):
        """A few images: {score: (n,) in MOS units}, NaN for consistency with an empty prompt."""
        images = [take_views(decode(path, **self.config["decode"]), **self.config["views"]) for path in paths]
        feed = {"pixels": np.stack(images)}
        if text := self.config["text"]:
            texts = [pattern.replace("{prompt}", prompt) for prompt in prompts for pattern in text["patterns"]]
            texts = [html.unescape(html.unescape(one)) for one in texts] if text["unescape"] else texts
            texts = [one.lower() for one in texts] if text["lower"] else texts
            distinct = list(dict.fromkeys(texts))
            feed["tokens"] = np.array([found.ids for found in self.tokenizer.encode_batch(distinct)])
            feed["prompt_of_image"] = np.reshape([distinct.index(one) for one in texts], (len(paths), -1))
        found = zip(self.config["scores"], self.session.run(None, feed), strict=True)
        known = [prompt.strip() != "" for prompt in prompts]
        return {name: np.where(known, mos, np.nan) if name == "pred_align" else mos for name, mos in found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--prompt", default="", help="what the images should show; without it: quality alone")
    args = parser.parse_args()
    scorer = Scorer(Path(__file__).parent)
    print("name", *scorer.config["scores"], sep="\t")
    for path in args.images:
        try:
            print(path, *(values[0] for values in scorer.score([path], [args.prompt]).values()), sep="\t")
        except Exception as error:  # noqa: BLE001  Pillow raises almost anything
            parser.exit(2, f"error: {path}: {error}\n")
