"""Which parameters train when, and how fast: by name, in stages, on any number of ranks.

DDP learns when it wraps the module which gradients to expect. A parameter that is unfrozen later would silently never
be averaged, and the ranks would drift apart; so DDP is built anew at every change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from callbacks.protocols import TakesRateFactors, require
from callbacks.staged_factors import StagedFactors, rescale

_NAMES_SHOWN = 5


class StagedFreezing(Callback):
    """Freezes the parameters whose names match, from one stage to the next.

    Names are those of the checkpoint's state dict (`net.levels.0.…`). What a model itself has fixed
    (`requires_grad=False` at the start) stays fixed in every stage.

    Parameters that train in some stage are in the optimiser from the start, whichever stage is first: without a
    gradient they take no step and no decay, their state is kept, and the checkpoint has one shape throughout.

    Args:
        stages: First epoch or step of a stage → globs of the parameters that are frozen in it, e.g.
            `{0: ["net.aggregator.*"], 10: []}`. Before the first stage nothing is frozen.
        unit: Whether stages count "epoch"s or optimiser "step"s.
        eval_frozen: Put a submodule whose parameters are all frozen into eval mode, so that its BatchNorm statistics
            and dropout rest too.
        lr_factors: Glob → factor on the learning rate, or → stages and the factor from each on (1 before the first):
            `{"net.aggregator.*": 0.1}`, `{"net.head.*": {2: 10.0, 5: 1.0}}`. The first glob that matches counts; a
            resumed run goes on from the factors that were in force, to those that the config now has.
    """

    def __init__(
        self,
        stages: dict[int, list[str]],
        unit: Literal["epoch", "step"] = "epoch",
        eval_frozen: bool = True,
        lr_factors: dict[str, float | dict[int, float]] | None = None,
    ) -> None:
        if not stages or any(start < 0 for start in stages):
            raise ValueError(f"callbacks.staged_freezing.stages must map epochs or steps from 0 on, got {stages}")
        if unit not in ("epoch", "step"):
            raise ValueError(f"callbacks.staged_freezing.unit must be 'epoch' or 'step', got '{unit}'")
        self.stages = {0: [], **{int(start): list(globs) for start, globs in sorted(stages.items())}}
        self.unit = unit
        self.eval_frozen = eval_frozen
        self._factors = StagedFactors(lr_factors or {}, "callbacks.staged_freezing.lr_factors")
        self._in_force = self._factors.at(0)  # factors that the optimiser's groups have
        self._stage = 0  # the key of the stage in force
        self._fixed: set[str] = set()
        self._module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze for the first stage, before DDP wraps the module.

        Raises:
            ValueError: a glob matches nothing, a stage leaves nothing to train, or the strategy can't change stages.
        """
        if stage != "fit":
            return
        if len(self.stages) > 1 and not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"callbacks.staged_freezing: {type(trainer.strategy).__name__} can't change what is frozen during a "
                "run; use DDP, or one stage"
            )
        if self._module is not pl_module:
            self._module = pl_module
            self._fixed = {name for name, p in pl_module.named_parameters() if not p.requires_grad}
            self._put_all_into_optimizers(pl_module)
        self._check(pl_module)
        if self._in_force:
            require(pl_module, TakesRateFactors, "staged_freezing.lr_factors")
            pl_module.lr_factor_globs.update(self._in_force)  # type: ignore[union-attr,operator]
        self._apply(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning leaves the modes as it finds them, so the first stage's are set here."""
        self._set_modes(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change stages; here rather than at an epoch's start, which a run resumed within the epoch has no more."""
        reached = trainer.global_step if self.unit == "step" else trainer.current_epoch
        self._change_rates(trainer, self._factors.at(reached))
        stage = max(start for start in self.stages if start <= reached)
        if stage == self._stage:
            return
        self._stage = stage
        self._apply(pl_module)
        self._set_modes(pl_module)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = trainer.strategy.lightning_module
            trainer.strategy.configure_ddp()
        rank_zero_info(f"{self.unit} {reached}: {self._describe(pl_module)}")

    def state_dict(self) -> dict[str, Any]:
        """The stage and the factors in force."""
        return {"stage": self._stage, "lr_factors": dict(self._in_force)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Freeze for the stage of the checkpoint; DDP wraps the module after this.

        Raises:
            ValueError: the stages were changed, and that one is no more; or the globs of the factors were.
        """
        stage = state_dict["stage"]
        if stage not in self.stages:
            raise ValueError(
                f"callbacks.staged_freezing: the checkpoint is in the stage that begins at {self.unit} {stage}; "
                f"the config has stages at {', '.join(map(str, self.stages))}"
            )
        saved = state_dict.get("lr_factors", {})
        if list(saved) != list(self._in_force):  # the optimiser's groups are cut by them
            raise ValueError(
                f"callbacks.staged_freezing.lr_factors: the checkpoint has factors for {list(saved)}, the config for "
                f"{list(self._in_force)}"
            )
        self._stage, self._in_force = stage, dict(saved)
        if self._module is not None:
            self._apply(self._module)

    def _change_rates(self, trainer: Trainer, factors: dict[str, float]) -> None:
        if factors == self._in_force:
            return
        rescale(trainer, {glob: factor / self._in_force[glob] for glob, factor in factors.items()})
        self._in_force = factors
        rank_zero_info("learning rate factors: " + ", ".join(f"{glob} {factor:g}" for glob, factor in factors.items()))

    def _is_frozen(self, name: str, stage: int) -> bool:
        return name in self._fixed or any(fnmatchcase(name, glob) for glob in self.stages[stage])

    def _apply(self, module: LightningModule) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not self._is_frozen(name, self._stage))
            if not parameter.requires_grad:
                parameter.grad = None

    def _set_modes(self, module: LightningModule) -> None:
        module.train()
        for part in module.modules() if self.eval_frozen else ():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()

    def _check(self, module: LightningModule) -> None:
        names = [name for name, _ in module.named_parameters()]
        asked = [(f"stages.{start}", glob) for start, globs in self.stages.items() for glob in globs]
        for key, glob in [*asked, *(("lr_factors", glob) for glob in self._factors)]:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"callbacks.staged_freezing.{key}: no parameter matches '{glob}'. " + _near_names(glob, names)
                )
        for start, globs in self.stages.items():
            if all(self._is_frozen(name, start) for name in names):
                raise ValueError(f"callbacks.staged_freezing.stages.{start} leaves nothing to train: {globs}")

    def _put_all_into_optimizers(self, module: LightningModule) -> None:
        """Show `configure_optimizers` every parameter that ever trains; timm's groups leave out frozen ones."""
        configure = module.configure_optimizers

        def configure_with_all() -> Any:
            with self._unfrozen(module):
                return configure()

        module.configure_optimizers = configure_with_all  # type: ignore[method-assign]

    @contextmanager
    def _unfrozen(self, module: nn.Module) -> Iterator[None]:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not all(self._is_frozen(name, stage) for stage in self.stages))
        try:
            yield
        finally:
            assert self._module is not None
            self._apply(self._module)

    def _describe(self, module: LightningModule) -> str:
        parameters = list(module.parameters())
        training = sum(p.numel() for p in parameters if p.requires_grad)
        return f"{training:,} of {sum(p.numel() for p in parameters):,} parameters train"


def _near_names(glob: str, names: list[str]) -> str:
    """Parameters and submodules whose names are most like a glob."""
    parts = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    plain = glob.replace("*", "").strip(".")
    near = difflib.get_close_matches(plain, [*names, *sorted(parts)], n=_NAMES_SHOWN, cutoff=0.5)
    near = [name if name in names else f"{name}.*" for name in near]
    return f"Near: {', '.join(near)}" if near else f"Names look like {', '.join(names[:_NAMES_SHOWN])}"
