"""Build, load and compile the network that a recipe names."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from torch import nn

CompileScope = Literal["none", "blocks", "net"]
_BLOCK_CONTAINERS = ("blocks", "layers", "layer1", "layer2", "layer3", "layer4")


def build_network(name: str, **arguments: Any) -> nn.Module:
    """One of Restrike's own models, or any of timm's, without weights.

    Raises:
        ValueError: nobody knows the name, or the model refuses an argument.
    """
    import timm

    from restrike import models

    own = models.list_models()
    try:
        if name in own:
            return models.build(name, **arguments)
        if timm.is_model(name.split(".")[0]):
            return timm.create_model(name, pretrained=False, **arguments)
    except TypeError as error:
        raise ValueError(f"model {name!r} refused its arguments {sorted(arguments)}: {error}") from error
    near = difflib.get_close_matches(name, [*own, *timm.list_models()], n=1)
    raise ValueError(f"unknown model_name {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def compile_network(net: nn.Module, scope: CompileScope, **arguments: Any) -> int:
    """Compile in place, so that names in the state dict stay as they are; copies of the network stay eager.

    Repeated blocks are compiled once each and not the network as a whole: gradients then leave block by block, and
    DDP's all-reduce overlaps with the backward pass.

    Returns:
        How many modules were compiled.

    Raises:
        ValueError: scope "blocks", but the network has no container of blocks under a usual name.
    """
    if scope == "none":
        return 0
    if scope == "net":
        net.compile(**arguments)
        return 1
    blocks = [
        block
        for name, container in net.named_modules()
        if name.rpartition(".")[2] in _BLOCK_CONTAINERS and isinstance(container, (nn.ModuleList, nn.Sequential))
        for block in container
    ]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    outermost = [block for block in blocks if id(block) not in inner]
    if not outermost:
        raise ValueError(
            f"compile='blocks': {type(net).__name__} has no container named {', '.join(_BLOCK_CONTAINERS)}; "
            "use compile='net'"
        )
    for block in outermost:
        block.compile(**arguments)
    return len(outermost)
