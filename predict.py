"""Score images with a trained run: from the command line, or from Python by its `Scorer`.

python predict.py --checkpoint runs/demo/best a.png b.png --prompt "a red circle"
python predict.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch is imported, which takes seconds.
    from cli.errors import one_line_errors
    from serving.commands import parse_predict_args
    from training.signals import end_as_usual, end_quietly

    end_quietly()
    with one_line_errors():
        parse_predict_args()

import torch

from cli.errors import one_line_errors
from serving import hub
from serving.batch_scoring import evaluate, join_shards, names_given, print_scores, write_scores, write_shard
from serving.commands import parse_predict_args
from serving.scorer import Scorer
from training import devices

__all__ = ["Scorer", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Score what the command line names; print the table, or write it to --out. Or give the scorer itself away."""
    with one_line_errors(torch.OutOfMemoryError):
        args = parse_predict_args(argv)
        devices.recycle_memory(args.device)
        if args.evaluate:
            evaluate(args)
            return
        if args.push_to_hub:
            from sharing.upload import push

            push(args)
            return
        names = names_given(args)
        args.checkpoint = hub.local_folder(args.checkpoint)
        if args.export:
            from sharing.export import export  # with libraries that scoring does without

            export(args, names)
        elif args.shard:
            write_shard(args, names)
        elif args.join:
            join_shards(args, names)
        elif args.out:
            write_scores(args, names)
        else:
            print_scores(args, names)
        devices.stop_runtime()


if __name__ == "__main__":
    end_as_usual()
    main(sys.argv[1:])
