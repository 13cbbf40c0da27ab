"""torch.export programs: the graph and its weights in one file that needs torch and nothing of ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from restrike.export.card import ModelCard
from restrike.export.files import new_file
from restrike.export.graph import check_outputs, trace

CARD_NAME = "model_card.json"


def save_program(net: nn.Module, path: str | Path, card: ModelCard, images: Tensor) -> dict[str, float]:
    """Write an `ExportedProgram` (.pt2) with free batch size, checked against the network first.

    `torch.export.load(path).module()(images)` gives a tuple of tensors in the order that the card's `outputs` lists.

    Args:
        images: what `example_images` gives; the program takes that height and width.

    Returns:
        The largest relative error of each output.

    Raises:
        ExportError: torch.export cannot trace the network, the graph computes something else, or the file exists.
    """
    path = Path(path)
    with new_file(path) as temporary:
        program, names = trace(net, images, "torch-export")
        graph = program.module()
        with torch.no_grad():
            errors = check_outputs(lambda batch: graph(batch), net, images, names, "torch-export")
        content = json.dumps({"outputs": names, **card.as_config()}, indent=2)
        with warnings.catch_warnings():
            # Tables that several layers share are views of one storage, which torch remarks on and saves rightly.
            warnings.filterwarnings("ignore", "No complete tensor found")
            torch.export.save(program, temporary, extra_files={CARD_NAME: content})
    return dict(errors)
