"""A page on this machine that scores images with a trained run, and shows where the model looked.

python app.py --checkpoint RUN/best
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch and Gradio are imported, which takes seconds.
    from cli.errors import one_line_errors
    from serving.commands import parse_app_args
    from training.signals import end_as_usual, end_quietly

    end_quietly()
    with one_line_errors():
        parse_app_args()
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("app.py needs Gradio: pip install -r requirements-extra.txt")
    # Both are read while Gradio is imported. Uploads: nobody else reads them, and they go when the program ends.
    uploads_folder = tempfile.TemporaryDirectory(prefix="image-scores-")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads_folder.name}
    # Nor are statistics of requests computed, which would take longer with each of the last 10,000, and nobody sees.
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(sys.maxsize)}

import gradio as gr
import torch

from cli.errors import one_line_errors
from serving import hub
from serving.answers import Answers, read_test_fold
from serving.commands import parse_app_args
from serving.page import build_page, serve
from serving.routes import build_routes, describe
from serving.shared_scorer import SharedScorer
from training import devices


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page of the checkpoint that the command line names until Ctrl-C ends it."""
    with one_line_errors(torch.OutOfMemoryError):
        args = parse_app_args(argv)
        devices.recycle_memory(args.device, one_pool=True)
        checkpoint = hub.local_folder(args.checkpoint)
        scorer = SharedScorer.load(checkpoint, device=args.device)
        folder = Path(gr.utils.get_upload_folder())
        answers = Answers(scorer, read_test_fold(checkpoint), folder, args.max_pixels)
        page = build_page(answers, title=args.checkpoint)
        routes = build_routes(answers, describe(scorer, checkpoint), args.accounts)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted then too
        address = serve(page, args.host, args.port, routes=routes, accounts=args.accounts)
        try:
            print(f"{address}   Ctrl-C ends it", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
        page.close(verbose=False)
        scorer.close()


if __name__ == "__main__":
    end_as_usual()
    main(sys.argv[1:])
