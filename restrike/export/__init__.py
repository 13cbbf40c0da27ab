"""Trained networks in the formats of other tools: safetensors, a hub folder, torch.export programs, ONNX.

Functions take a network and a `ModelCard`, which every format carries. None of them overwrites a file, and a file
appears whole or not at all. What a format cannot hold raises `ExportError`.
"""

from restrike.export.card import ModelCard
from restrike.export.errors import ExportError
from restrike.export.onnx import save_onnx
from restrike.export.program import save_program
from restrike.export.safetensors import save_hub_folder, save_safetensors

__all__ = ["ExportError", "ModelCard", "save_hub_folder", "save_onnx", "save_program", "save_safetensors"]
