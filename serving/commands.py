"""The command lines of predict.py and app.py, checked without torch: mistakes answer at once."""

from __future__ import annotations

import argparse
import mimetypes
import os
import re
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from backbones.download import HF_HUB
from cli.exports import PRECISIONS, check_export
from cli.options import split_list
from cli.parser import OneLineParser
from configs import DATASET_NAMES, OPTIONS, check_dataset_name

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
PILLOW_MAX_PIXELS = 178_956_970  # above which Pillow itself refuses an image


def build_predict_parser() -> argparse.ArgumentParser:
    """The command line of predict.py."""
    parser = OneLineParser(
        prog="predict.py",
        usage="python predict.py --checkpoint RUN/best (IMAGE... | --csv FILE | --image_dir DIR) [flags]\n"
        "       python predict.py --checkpoint RUN --evaluate (--csv FILE | --dataset NAME --data_root DIR) [flags]\n"
        "       python predict.py --checkpoint RUN/best --export DIR [IMAGE... | --image_dir DIR] [--precision P]\n"
        "       python predict.py --checkpoint RUN/best --push_to_hub ORG/NAME [--public] [--license L] [--yes]",
        description="Score images with a trained run, in the MOS units of its training data.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        metavar="DIR",
        help="RUN/best, RUN itself, or hf-hub:ORG/NAME; several times with --evaluate",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--prompt", metavar="TEXT", help="what the images should show; without it: quality alone")
    parser.add_argument("--csv", metavar="FILE", help="table of image names and prompts")
    parser.add_argument("--image_dir", metavar="DIR", help="folder of the CSV's names; alone: score all images in it")
    parser.add_argument(
        "--follow_links", action="store_true", help="also take images through links that leave --image_dir"
    )
    parser.add_argument("--name_column", default="name", metavar="COLUMN", help="(default: name)")
    parser.add_argument("--prompt_column", default="prompt", metavar="COLUMN", help="(default: prompt)")
    parser.add_argument(
        "--out", metavar="FILE", help="write name,pred_quality,pred_align (or the table of --evaluate) there"
    )
    add_other_uses(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="(default: 64)")
    parser.add_argument(
        "--chunk_size", type=int, default=4096, help="rows at a time that --out keeps if stopped (default: 4096)"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="with --out: score only this part of the pieces, as one of N jobs that see the same folder, in any order",
    )
    parser.add_argument("--join", action="store_true", help="with --out: join what all shards have scored")
    parser.add_argument(
        "--num_workers", type=int, help="threads that decode images (default: one per core, at most 16)"
    )
    parser.add_argument(
        "--device", choices=OPTIONS["device"].metadata["choices"], default="auto", help="(default: auto)"
    )
    parser.add_argument(
        "--amp",
        choices=OPTIONS["amp"].metadata["choices"],
        default="off",
        help="precision of CLIP: auto, bf16 and fp16 are faster and move the scores a little (default: off)",
    )
    return parser


def add_other_uses(parser: argparse.ArgumentParser) -> None:
    """The flags of --evaluate, --export and --push_to_hub."""
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="compare with the human scores of --csv or --dataset, on images that the run has not seen",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME[,NAME]",
        help=f"with --evaluate: data sets as downloaded ({', '.join(DATASET_NAMES)})",
    )
    parser.add_argument("--data_root", metavar="DIR[,DIR]", help="folder of each --dataset")
    both = OPTIONS["duplicates"].metadata["choices"]
    parser.add_argument("--duplicates", choices=both, default="error", help="with --evaluate: CSV rows of one image")
    parser.add_argument("--group_column", metavar="COLUMN", help="with --evaluate: CSV column naming the generator")
    for name in ("quality_column", "consistency_column"):
        default = OPTIONS[name].default
        parser.add_argument(
            f"--{name}", default=default, metavar="COLUMN", help=f"with --evaluate (default: {default})"
        )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="write the whole scorer as ONNX into a new folder, with a score.py that needs no torch, and compare both "
        "on the run's test images, or on those that are named",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="with --export: float16 stores and computes CLIP with half the bits, int8 its linear layers with a "
        "quarter (default: float32)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="ORG/NAME",
        help="share the checkpoint with a model card on the Hugging Face hub, privately; shown before, and asked for",
    )
    parser.add_argument("--public", action="store_true", help="with --push_to_hub: for everybody")
    parser.add_argument(
        "--license", metavar="L", help="with --push_to_hub: the hub's name of a licence, such as mit (default: none)"
    )
    parser.add_argument("--yes", action="store_true", help="with --push_to_hub: do not ask")


def parse_predict_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of predict.py -> checked options.

    Raises:
        ValueError: an unknown flag, a value that breaks its rule, or not exactly one source of images.
    """
    parser = build_predict_parser()
    args = parser.parse_args(argv)
    for name in ("batch_size", "num_workers"):
        OPTIONS[name].check(getattr(args, name))
    if args.chunk_size < 1:
        raise ValueError(f"--chunk_size {args.chunk_size}: must be at least 1")
    args.checkpoints, args.checkpoint = args.checkpoint, args.checkpoint[0]
    check_evaluation(args, parser)
    check_exporting(args)
    check_push(args)
    check_shard(args)
    for name in args.checkpoints:
        check_hub_checkpoint(name)
    if args.images and (args.csv or args.image_dir):
        raise ValueError(f"{args.images[0]}: image files or {'--csv' if args.csv else '--image_dir'}, not both")
    if not (args.images or args.csv or args.image_dir or args.evaluate or args.export or args.push_to_hub):
        raise ValueError("no images to score: give IMAGE..., --csv FILE or --image_dir DIR; see --help")
    if args.csv and args.prompt is not None:
        raise ValueError("--prompt: the prompts come from --csv, drop one of the two")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
        raise ValueError(f"--out {args.out}: must be a file in a folder that exists")
    if args.out and (mimetypes.guess_type(args.out)[0] or "").startswith("image/"):
        raise ValueError(f"--out {args.out}: is the name of an image, and will be a table; name it .csv")
    if args.out and any(is_same_file(args.out, path) for path in (*args.images, args.csv or "")):
        raise ValueError(f"--out {args.out}: is what is to be read, and would be overwritten")
    if not args.out and not args.evaluate and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several processes need --out FILE: each scores a part of it")
    return args


def is_same_file(one: str, other: str) -> bool:
    """Whether both are there and are one file."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def check_evaluation(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Rules around --evaluate. Raises ValueError."""
    names, roots = split_list(args.dataset), split_list(args.data_root)
    if not args.evaluate:
        if len(args.checkpoints) > 1 or names or roots:
            raise ValueError(f"{'--dataset' if names or roots else 'several --checkpoint'}: works with --evaluate only")
        for flag in ("duplicates", "group_column", "quality_column", "consistency_column"):
            if getattr(args, flag) != parser.get_default(flag):
                raise ValueError(f"--{flag}: works with --evaluate only")
        return
    if args.images or not (args.csv or names):
        raise ValueError("--evaluate: needs human scores: --csv FILE or --dataset NAME --data_root DIR, and no IMAGE")
    for name in names:
        check_dataset_name(name, *DATASET_NAMES)
    if len(names) != len(roots):
        raise ValueError(f"--data_root: has {len(roots)} folder(s) for {len(names)} --dataset; give one for each")
    if args.prompt is not None:
        raise ValueError("--prompt: the prompts come with the human scores, drop it")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--evaluate: runs in one process; leave torchrun out")


def check_shard(args: argparse.Namespace) -> None:
    """Rules around --shard, which becomes a pair of numbers, and --join. Raises ValueError."""
    if not (args.shard or args.join):
        return
    flag = "--shard" if args.shard else "--join"
    if args.shard and args.join:
        raise ValueError("--join: joins what all shards have scored, drop --shard")
    if not args.out or args.evaluate:
        raise ValueError(f"{flag}: needs --out FILE, the table that all shards fill, and no --evaluate")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{flag}: runs in one process; leave torchrun out")
    if args.shard:
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", args.shard)
        if not found or int(found[1]) > int(found[2]):
            raise ValueError(f"--shard {args.shard}: must be such as 3/16, the third of sixteen")
        args.shard = int(found[1]), int(found[2])
    if args.amp == "auto":
        raise ValueError(f"{flag}: each machine would choose a precision for itself; name one for all by --amp")


def check_exporting(args: argparse.Namespace) -> None:
    """Rules around --export. Raises ValueError."""
    if not args.export:
        if args.precision:
            raise ValueError(f"--precision {args.precision}: works with --export only")
        return
    for flag in ("csv", "out", "evaluate", "shard", "join"):
        if getattr(args, flag):
            raise ValueError(f"--{flag}: does not go with --export, drop one of the two")
    if args.prompt is not None and not (args.images or args.image_dir):
        raise ValueError("--prompt: belongs to IMAGE... or --image_dir; without them the run's own prompts are used")
    check_export("--export", "--export", args.export, args.device)


@cache
def read_once(path: str) -> str:
    """The text of a file, which may be a pipe: programs read their flags twice. Raises OSError, UnicodeDecodeError."""
    return Path(path).read_text(encoding="utf-8-sig")


def read_accounts(args: argparse.Namespace) -> dict[str, str]:
    """Password by user, of --auth or --auth_file; empty without. Raises OSError, and ValueError, which tells none."""
    if args.auth is not None and args.auth_file is not None:
        raise ValueError("--auth_file: drop either it or --auth")
    given = {"--auth": args.auth} if args.auth is not None else {}
    if args.auth_file is not None:
        try:
            lines = read_once(args.auth_file).splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--auth_file {args.auth_file}: must be text in UTF-8") from None
        given = {f"--auth_file {args.auth_file} line {n}": line for n, line in enumerate(lines, 1) if line.strip()}
        if not given:
            raise ValueError(f"--auth_file {args.auth_file}: must have a line USER:PASSWORD")
    accounts: dict[str, str] = {}
    for place, line in given.items():
        user, _, password = line.partition(":")
        if not user or user != user.strip() or not password:  # Gradio strips the names that it is given
            raise ValueError(f"{place}: must be USER:PASSWORD, neither empty, no space around USER")
        if user in accounts:
            raise ValueError(f"{place}: the user {user} has a line above already")
        accounts[user] = password
    return accounts


def check_push(args: argparse.Namespace) -> None:
    """Rules around --push_to_hub. Raises ValueError."""
    if not args.push_to_hub:
        for flag in ("public", "license", "yes"):
            if getattr(args, flag):
                raise ValueError(f"--{flag}: works with --push_to_hub only")
        return
    if args.images:
        raise ValueError(f"{args.images[0]}: --push_to_hub scores no images, drop one of the two")
    for flag in ("csv", "image_dir", "prompt", "out", "evaluate", "export", "shard", "join"):
        if getattr(args, flag):
            raise ValueError(f"--{flag}: does not go with --push_to_hub, drop one of the two")
    if not HUB_NAME.fullmatch(args.push_to_hub):
        raise ValueError(f"--push_to_hub {args.push_to_hub}: must be ORG/NAME, ORG being you or an organisation")
    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise ValueError(f"--license {args.license}: must be a name such as mit, apache-2.0, cc-by-4.0 or other")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--push_to_hub: runs in one process; leave torchrun out")


def check_hub_checkpoint(name: str) -> bool:
    """Whether a checkpoint is named as one on the hub. Raises ValueError for a name that is none."""
    if not name.startswith(HF_HUB):
        return False
    if not HUB_NAME.fullmatch(name.removeprefix(HF_HUB)):
        raise ValueError(f"--checkpoint {name}: must be {HF_HUB}ORG/NAME")
    return True


def build_app_parser() -> argparse.ArgumentParser:
    """The command line of app.py."""
    parser = OneLineParser(
        prog="app.py",
        usage="python app.py --checkpoint RUN/best [flags]",
        description="Serve a page on this machine that scores images with a trained run and shows where it looked. "
        "What is uploaded stays here and is deleted when the page ends.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="RUN/best, RUN itself, or hf-hub:ORG/NAME")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0 lets other machines in, who need no password unless --auth or --auth_file asks "
        "for one (default: 127.0.0.1, this one only)",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="(default: 7860)")
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for this password, which whoever lists the processes of this machine sees here",
    )
    parser.add_argument(
        "--auth_file", metavar="FILE", help="ask for a password of this file, a USER:PASSWORD in each of its lines"
    )
    parser.add_argument(
        "--device", choices=OPTIONS["device"].metadata["choices"], default="auto", help="(default: auto)"
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=50_000_000,
        metavar="N",
        help="images with more are refused before they are decoded (default: 50000000)",
    )
    return parser


def parse_app_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of app.py -> checked options.

    Raises:
        ValueError: an unknown flag, a value that breaks its rule, no checkpoint, or an address that cannot be used.
        OSError: --auth_file cannot be read.
    """
    args = build_app_parser().parse_args(argv)
    args.accounts = read_accounts(args)
    if not 1 <= args.max_pixels <= PILLOW_MAX_PIXELS:
        raise ValueError(f"--max_pixels {args.max_pixels}: must lie in 1..{PILLOW_MAX_PIXELS}, Pillow reads no more")
    folder = Path(args.checkpoint)
    is_here = any((folder / name).is_file() for name in ("scorer.json", "best/scorer.json"))
    if not check_hub_checkpoint(args.checkpoint) and not is_here:
        raise ValueError(f"--checkpoint {folder}: not a checkpoint, scorer.json is missing; name RUN/best or RUN")
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: must lie in 1..65535")
    try:
        found = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(found[0][4])
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--host {args.host} --port {args.port}: cannot listen there ({reason})") from None
    return args
