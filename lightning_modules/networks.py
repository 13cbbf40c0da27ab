"""Build, load and compile the network that a recipe names."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from torch import nn

CompileScope = Literal["none", "blocks", "net"]
_BLOCK_CONTAINERS = ("blocks", "layers", "layer1", "layer2", "layer3", "layer4")


def build_network(name: str, *, download: bool = False, **arguments: Any) -> nn.Module:
    """One of Restrike's own models, or any of timm's.

    Args:
        name: Of the model; timm's may have a tag (`vit_base_patch14_reg4_dinov2.lvd142m`).
        download: Let timm fetch the weights of that name and tag; without, weights are random.
        arguments: More constructor arguments.

    Raises:
        ValueError: nobody knows the name, the model refuses an argument, or timm can't get the weights.
    """
    import timm

    from restrike import models

    own = models.list_models()
    try:
        if name in own:
            if download:
                raise ValueError(f"model.pretrained='timm': {name!r} is not timm's; give the released weight file")
            return models.build(name, **arguments)
        if timm.is_model(name.split(".")[0]):
            return timm.create_model(name, pretrained=download, **arguments)
    except TypeError as error:
        raise ValueError(f"model {name!r} refused its arguments {sorted(arguments)}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not download:
            raise
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"model.pretrained='timm': no weights of {name!r} ({first_line}); where there is no network, fetch "
            "model.safetensors elsewhere and give the file as model.pretrained"
        ) from error
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
    outermost = repeated_blocks(net)
    if not outermost:
        raise ValueError(
            f"compile='blocks': {type(net).__name__} has no container named {', '.join(_BLOCK_CONTAINERS)}; "
            "use compile='net'"
        )
    for block in outermost:
        block.compile(**arguments)
    return len(outermost)


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks of a network, found by the usual names of their containers; maybe none."""
    blocks = [
        block
        for name, container in net.named_modules()
        if name.rpartition(".")[2] in _BLOCK_CONTAINERS and isinstance(container, (nn.ModuleList, nn.Sequential))
        for block in container
    ]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner]


def classifier_names(net: nn.Module) -> list[str]:
    """Names of the modules that turn features into logits, as timm's `pretrained_cfg` says.

    Raises:
        ValueError: the network doesn't say.
    """
    names = (getattr(net, "pretrained_cfg", None) or {}).get("classifier")
    if not names:
        raise ValueError(f"model.head_lr_factor: {type(net).__name__} names no classifier; use model.lr_factors")
    return [names] if isinstance(names, str) else list(names)


def checkpoint_activations(net: nn.Module, mode: bool | Literal["selective"] = True) -> None:
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time.

    Args:
        net: The network.
        mode: "selective" keeps the results of products too.

    Raises:
        ValueError: the network has no `set_grad_checkpointing`, or not that mode.
    """
    if not hasattr(net, "set_grad_checkpointing"):
        raise ValueError(f"model.grad_checkpointing: {type(net).__name__} has no activation checkpointing")
    if mode == "selective" and not getattr(net, "has_selective_checkpointing", False):
        raise ValueError(f"model.grad_checkpointing: {type(net).__name__} has no selective form; set it to true")
    net.set_grad_checkpointing(mode)
