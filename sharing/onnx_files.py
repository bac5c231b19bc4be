"""A network as an ONNX file, whole or smaller."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from storage.messages import one_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}  # in which networks compute
# Of onnxruntime's optimisers, those that a graph crashes in: this one lays out convolutions of 16 bits on CPUs.
DISABLED = {"float16": ["NchwcTransformer"]}


def write_onnx(
    graph: nn.Module,
    inputs: Mapping[str, Tensor],
    free: Mapping[str, dict[int, Any]],
    path: Path,
    precision: str,
    *,
    outputs: Sequence[str],
    named: str,
    within: str = "",
) -> None:
    """Write a graph into a file, its weights into a second one, <name>.data, where they are large.

    Args:
        inputs: arguments of its forward, of the right shapes.
        free: which of their dimensions may be of any size.
        named: what cannot be exported, if it cannot, behind the flag that asked for it.
        within: the parts whose linear layers int8 stores in 8 bits, by a piece of their names; by default all.

    Raises:
        ValueError: torch.export cannot follow it; one line.
    """
    try:
        with silence(), torch.no_grad():
            program = torch.export.export(graph, (), dict(inputs), dynamic_shapes=dict(free))
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dict(free),
                verbose=False,
            )
    except Exception as error:  # whatever torch.export meets in a network that it cannot follow
        raise ValueError(f"{named} cannot be exported by torch.onnx ({one_line(error)[:200]})") from error
    assert written is not None
    if precision != "int8":
        written.save(str(path))
        return
    with TemporaryDirectory(dir=path.parent) as whole, silence():
        written.save(str(Path(whole) / path.name))
        quantize(Path(whole) / path.name, path, within)


@contextmanager
def silence() -> Iterator[None]:
    """Without the exporters' own warnings, which are about their insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quantize(path: Path, target: Path, within: str) -> None:
    """Store weights of linear layers in 8 bits, one scale per row; activations are quantised as they come.

    Convolutions stay as they are: the range of what enters them would have to be measured on images first.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    scope = "pkg.torch.onnx.name_scopes"
    inside = {node.name: next((p.value for p in node.metadata_props if p.key == scope), "") for node in nodes}
    quantize_dynamic(
        path,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[name for name, scopes in inside.items() if within not in scopes],
        use_external_data_format=path.with_name(f"{path.name}.data").exists(),
    )
