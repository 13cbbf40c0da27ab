"""ONNX: the graph for other runtimes, by torch's dynamo exporter, checked by onnxruntime where it is installed."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restrike.export.card import ModelCard
from restrike.export.errors import ExportError
from restrike.export.files import new_file
from restrike.export.graph import check_outputs, first_line, trace

_INPUT = "images"
_LARGEST_FILE = 2_000_000_000  # protobuf's limit, less what the graph itself needs


def save_onnx(net: nn.Module, path: str | Path, card: ModelCard, images: Tensor) -> dict[str, float]:
    """Write an ONNX graph with free batch size. Weights beyond 2 GB lie beside it in `<path>.data`.

    Input `images`; outputs "logits" or the names of the predictions; the card is in the graph's metadata.

    Args:
        images: what `example_images` gives; the graph takes that height and width.

    Returns:
        The largest relative error of each output in onnxruntime; empty where that is not installed.

    Raises:
        ExportError: packages are missing, the exporter cannot carry the network, the graph computes something else,
            or the file exists.
    """
    path = Path(path)
    _require("onnx", "onnxscript")
    with new_file(path) as temporary:
        program, names = trace(net, images, "onnx")
        converted = _convert(program, names, net, images.ndim)
        converted.model.metadata_props.update({**card.as_metadata(), "outputs": json.dumps(names)})
        is_large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _LARGEST_FILE
        converted.save(temporary, external_data=is_large)
        if importlib.util.find_spec("onnxruntime") is None:
            return {}
        return dict(check_outputs(_runtime(temporary), net, images, names, "onnx"))


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'restrike[onnx]'")


def _convert(program: torch.export.ExportedProgram, names: list[str], net: nn.Module, num_axes: int) -> Any:
    free = {0: "batch", 1: "views"} if num_axes == 5 else {0: "batch"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own use of deprecated parts
            return torch.onnx.export(
                program, dynamo=True, input_names=[_INPUT], output_names=names, dynamic_shapes=(free,), verbose=False
            )
    except Exception as error:  # a missing operator, a failed pass: the exporter has its own types for each
        raise ExportError(
            f"onnx cannot carry {type(net).__name__}: {first_line(error)}; torch-export, safetensors and hub can"
        ) from error


def _runtime(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: [torch.from_numpy(out) for out in session.run(None, {_INPUT: batch.numpy()})]
