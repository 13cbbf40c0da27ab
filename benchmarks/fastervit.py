"""FasterViT against the released code (PyPI package `fastervit`), float32, in one process.

    pip install --no-deps fastervit
    python -m benchmarks fastervit                       # all parts, each in its own process
    python -m benchmarks fastervit inference             # eager and deployed: variants 0 and 2, batch 1 and 8
    python -m benchmarks fastervit large                 # the same of variant 4
    python -m benchmarks fastervit compiled              # torch.compile of the inference form, and of the peer
    python -m benchmarks fastervit any-res               # 576x960
    python -m benchmarks fastervit training              # a step, without and with EMA and MESA
    python -m benchmarks fastervit --device cuda         # bfloat16 autocast, batch 128
    python -m benchmarks.fastervit inference --variants 0 --batches 8 --no-record

Both models get the same weights, and their outputs are compared in float32 before anything is timed. One thread is
timed in CPU seconds, which other processes disturb less; several threads and GPUs in wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.utils import ModelEmaV2
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row, assert_close, clock_of, compare, compare_forms, environment, pin_threads, record
from benchmarks.targets import PARTS
from restrike.losses import mesa_loss
from restrike.optim import WeightAverage

TOLERANCE = 1e-4
DECAY, MESA_RATIO, TEMPERATURE, MESA_WEIGHT = 0.9998, 0.25, 3.0, 50.0  # of the released recipe
ANY_RES = (576, 960)
# Of each part on a CPU. Inference gets two threads, so that all four parts together end within five minutes.
VARIANTS = {"inference": ("0", "2"), "large": ("4",), "compiled": ("0",), "any-res": ("0",), "training": ("0",)}
THREADS = {"training": 1}


def pair(variant: str, name: str = "faster_vit_{}_224", **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, the released one) with equal weights, in eval mode."""
    model = name.format(variant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports deprecated names, and takes our names in timm's registry
        try:
            from fastervit import create_model
        except ImportError as error:
            raise SystemExit(f"{error}\nthis benchmark needs its peer: pip install --no-deps fastervit") from error
        with contextlib.redirect_stdout(None):
            peer = create_model(model, **arguments).eval()
        from restrike.models import build

    ours = build(model, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02)  # so that biases and normalisation weights take part
    missing, unexpected = ours.load_state_dict(peer.state_dict())
    assert not missing and not unexpected
    return ours, peer


def images(batch: int, size: Sequence[int] = (224, 224)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


class Bench:
    """The rows of one part, on one device."""

    def __init__(self, part: str, device: str, batches: Sequence[int]) -> None:
        self.device, self.batches = torch.device(device), batches
        self.is_gpu, self.clock = self.device.type != "cpu", clock_of(device)
        self.part, self.rows = part, list[Row]()

    def inference(self, variants: Sequence[str]) -> None:
        """Eager and deployed, of each variant and batch size."""
        for variant in variants:
            self._forms(f"FasterViT-{variant} inference", pair(variant), {"eager": _eager, "deployed": _deployed})

    def large(self, variants: Sequence[str]) -> None:
        """The same of variant 4, whose eight images take the released code ten seconds."""
        self.inference(variants)

    def compiled(self, variants: Sequence[str]) -> None:
        """torch.compile of the inference form against the released code, as it stands and compiled."""
        batches = self.batches[-1:]  # one more would be compiled again
        for variant in variants:
            self._forms(f"FasterViT-{variant} inference", pair(variant), {"compiled": _compiled}, batches)
        ours, peer = pair(variants[0])
        title = f"FasterViT-{variants[0]} inference, against the compiled peer"
        self._forms(title, (ours, torch.compile(peer)), {"compiled": _compiled}, batches)  # type: ignore[arg-type]

    def any_res(self, variants: Sequence[str]) -> None:
        """One image of 576 x 960."""
        models = pair(variants[0], "faster_vit_{}_any_res", resolution=list(ANY_RES))
        title = f"FasterViT-{variants[0]} any-res inference at {ANY_RES[0]}x{ANY_RES[1]}"
        self._forms(title, models, {"eager": _eager, "deployed": _deployed}, self.batches[:1], ANY_RES)

    def training(self, variants: Sequence[str]) -> None:
        """A step of the largest batch size: by itself, then with EMA and the MESA term."""
        variant, batch = variants[0], self.batches[-1]
        ours, peer = pair(variant)
        x, targets = images(batch).to(self.device), torch.arange(batch, device=self.device)
        models = [model.to(self.device) for model in (ours, peer)]
        # Before the first forward: the peer keeps tensors with a graph, which nothing can copy.
        average, peer_average = WeightAverage(models[0], DECAY), ModelEmaV2(models[1], decay=DECAY)
        gradients = [_gradients(model, x[:8], targets[:8]) for model in models]
        error = assert_close(gradients[0], gradients[1], TOLERANCE)
        error_mesa = assert_close(*(_mesa_term(model, x[:8]) for model in models), TOLERANCE)
        with self._precision():
            title = f"FasterViT-{variant} training step"
            steps = [_step(model.train(), x, targets) for model in models]
            timing = compare(*steps, rounds=7, warmup=1, clock=self.clock)
            self._record(title, timing, batch, f"gradients within {error:.0e}")
            steps = [
                _step(models[0], x, targets, average.module, average.update),
                _step(models[1], x, targets, peer_average.module, lambda: peer_average.update(models[1])),
            ]
            timing = compare(*steps, rounds=7, warmup=1, clock=self.clock)
        checked = f"gradients within {error:.0e}, MESA term within {error_mesa:.0e}"
        self._record(f"{title} with EMA and MESA", timing, batch, checked, " and timm ModelEmaV2")

    def _forms(
        self,
        title: str,
        models: tuple[nn.Module, nn.Module],
        forms: Mapping[str, Callable[[nn.Module], nn.Module]],
        batches: Sequence[int] | None = None,
        size: Sequence[int] = (224, 224),
    ) -> None:
        ours, peer = (model.to(self.device) for model in models)
        made = {name: make(ours if name == "eager" else copy.deepcopy(ours)) for name, make in forms.items()}
        if self.is_gpu:
            made = {name: model.to(memory_format=torch.channels_last) for name, model in made.items()}
        for batch in batches or self.batches:
            x = images(batch, size).to(self.device)
            with torch.inference_mode():
                expected = peer(x)
                errors = {name: assert_close(model(x), expected, TOLERANCE) for name, model in made.items()}
                with self._precision():
                    calls = {name: lambda model=model, x=x: model(x) for name, model in made.items()}
                    timings = compare_forms(calls, lambda x=x: peer(x), warmup=self.is_gpu * 5, clock=self.clock)
            for name, timing in timings.items():
                self._record(f"{title}, batch {batch}", timing, batch, f"logits within {errors[name]:.0e}", form=name)

    def _precision(self) -> torch.autocast:
        """bfloat16 on a GPU, whatever runs there in float32 being timed by nobody; nothing here."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_gpu)

    def _record(self, title: str, timing: Any, items: int, checked: str, peer: str = "", form: str = "") -> None:
        where = f" on {self.device.type}" if self.is_gpu else ""
        command = f"python -m benchmarks fastervit {self.part}" + (f" --device {self.device}" if self.is_gpu else "")
        name = ", ".join(filter(None, [title + where, form]))
        peer_name = f"fastervit 1.0.0{peer}"
        row = Row.of(timing, name=name, peer_name=peer_name, checked=checked, command=command, items=items)
        print(f"{row.name}: {row.ratio} ({row.spread}), {row.ours} against {row.peer}", flush=True)
        self.rows.append(row)


def _eager(model: nn.Module) -> nn.Module:
    return model


def _deployed(model: Any) -> nn.Module:
    return model.switch_to_deploy()


def _compiled(model: Any) -> nn.Module:
    return torch.compile(model.switch_to_deploy())  # type: ignore[return-value]


def _gradients(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """All of them in one vector, without stochastic depth, whose draws differ."""
    F.cross_entropy(model.eval()(x), targets).backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.cat([gradients[name] for name in sorted(gradients)])


def _mesa_term(model: nn.Module, x: Tensor) -> Tensor:
    """The term of a model whose teacher sees the mirrored images, so that it is not 0."""
    with torch.no_grad():
        return mesa_loss(model.eval()(x), model(x.flip(-1)), TEMPERATURE, MESA_WEIGHT)


def _step(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    teacher: nn.Module | None = None,
    update: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, the same for both; with a teacher MESA's term and the average's update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        logits = model(x)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        if teacher is not None:
            with torch.no_grad():
                soft = teacher(x)
            loss = loss + MESA_RATIO * mesa_loss(logits, soft, TEMPERATURE, MESA_WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        update()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS["fastervit"])
    parser.add_argument("--variants", nargs="+", help="default: those of the part")
    parser.add_argument("--batches", nargs="+", type=int, help="1 and 8; on a GPU 128")
    parser.add_argument("--threads", type=int, help="1 for training, else 2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    threads = args.threads or THREADS.get(args.part, 2)
    pin_threads(threads)
    is_gpu = args.device != "cpu"
    bench = Bench(args.part, args.device, args.batches or ([128] if is_gpu else [1, 8]))
    getattr(bench, args.part.replace("-", "_"))(args.variants or VARIANTS[args.part])
    if not args.no_record:
        record(*bench.rows, where=f"{environment('timm', 'fastervit')}; {threads} thread(s)")


if __name__ == "__main__":
    main()
