"""The model card: what an exported file says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

_FORMAT = "restrike-card-1"


@dataclass(frozen=True)
class ModelCard:
    """Where weights come from and how they are used. All values are plain (JSON).

    Attributes:
        model_name: that `restrike.models.build` or `timm.create_model` takes.
        model_args: the constructor arguments beside it that give this very network.
        weights: "raw", or "ema" for averaged ones.
        recipe: that trained them.
        licence: of the weights. The code's own is Apache-2.0 and says nothing about them.
        code_version: of Restrike, with the commit where it is known.
        metrics: numbers that were measured with these weights, by name; empty where none are known.
        preprocessing: what an image goes through before the network (image_size, mean, std, crop_pct …).
    """

    model_name: str
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = "raw"
    recipe: str = ""
    licence: str = "not stated"
    code_version: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)

    def as_config(self) -> dict[str, Any]:
        """Content of a hub folder's config.json: what timm reads of one, and the card whole under "restrike"."""
        values = asdict(self)
        arguments = values.pop("model_args")
        config = {"architecture": values.pop("model_name"), "model_args": arguments}
        if timm_cfg := _timm_cfg(self.preprocessing, arguments.get("num_classes")):
            config |= {"pretrained_cfg": timm_cfg}
        return config | {"restrike": {"format": _FORMAT, **values}}

    def as_metadata(self) -> dict[str, str]:
        """The card as strings, as safetensors and ONNX want them; nested values are JSON."""
        values = {"card_format": _FORMAT, **asdict(self)}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    def as_markdown(self) -> str:
        """A page for people."""
        rows = [("weights", self.weights), ("recipe", self.recipe), ("code", f"Restrike {self.code_version}")]
        rows += [(name, f"{value:.6g}") for name, value in self.metrics.items()]
        rows += [(name, f"`{json.dumps(value)}`") for name, value in self.preprocessing.items()]
        lines = [f"# {self.model_name}", "", f"Licence of the weights: {self.licence}.", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in rows if value]
        usage = ["", "```python", "import restrike", "", 'model = restrike.from_pretrained("this/folder")', "```", ""]
        return "\n".join(lines + usage)


def _timm_cfg(preprocessing: dict[str, Any], num_classes: int | None) -> dict[str, Any]:
    """timm's own words for a classifier's preprocessing; empty for other networks."""
    if num_classes is None:
        return {}
    size = preprocessing.get("image_size")
    cfg = {name: preprocessing.get(name) for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    cfg["input_size"] = None if size is None else [3, *([size, size] if isinstance(size, int) else size)]
    return {"num_classes": num_classes, **{name: value for name, value in cfg.items() if value is not None}}
