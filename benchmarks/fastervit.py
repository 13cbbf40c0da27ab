"""FasterViT against the released code (PyPI package `fastervit`), on a CPU, float32, in one process.

    pip install --no-deps fastervit
    python -m benchmarks.fastervit                       # all rows of docs/benchmarks.md
    python -m benchmarks.fastervit --variants 0 --batches 8 --forms eager --no-training
    python -m benchmarks.fastervit --forms compiled      # torch.compile of the inference form

Both models get the same weights, and their outputs are compared before anything is timed. One thread is timed in CPU
seconds, which other processes disturb less; several in wall time.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row, Timing, assert_close, compare, environment, pin_threads, record

FORMS = ("eager", "deployed", "compiled")
TOLERANCE = 1e-4
COMMAND = "python -m benchmarks fastervit"


def pair(variant: str) -> tuple[nn.Module, nn.Module]:
    """(ours, the released one) with equal weights, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports deprecated names, and takes our names in timm's registry
        try:
            from fastervit import create_model
        except ImportError as error:
            raise SystemExit(f"{error}\nthis benchmark needs its peer: pip install --no-deps fastervit") from error
        peer = create_model(f"faster_vit_{variant}_224").eval()
        from restrike.models import build

    ours = build(f"faster_vit_{variant}_224").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02)  # so that biases and normalisation weights take part
    missing, unexpected = ours.load_state_dict(peer.state_dict())
    assert not missing and not unexpected
    return ours, peer


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch))


def inference(variant: str, batches: list[int], forms: list[str]) -> list[Row]:
    """One row for each batch size and form."""
    eager, peer = pair(variant)
    rows = []
    for form in forms:
        ours: Callable[[Tensor], Tensor] = eager
        if form != "eager":
            ours = copy.deepcopy(eager).switch_to_deploy()  # type: ignore[operator]
        if form == "compiled":
            ours = torch.compile(ours)
        for batch in batches:
            x = images(batch)
            with torch.inference_mode():
                error = assert_close(ours(x), peer(x), TOLERANCE)
                timing = _compare(lambda x=x, f=ours: f(x), lambda x=x: peer(x))  # type: ignore[misc]
            rows.append(_row(timing, f"FasterViT-{variant} inference, batch {batch}, {form}", batch, error))
    return rows


def training(variant: str, batch: int) -> Row:
    """Forward, backward, clipping and AdamW, the same for both."""
    ours, peer = pair(variant)
    x, targets = images(batch), torch.arange(batch)
    error = assert_close(_gradients(ours, x, targets), _gradients(peer, x, targets), TOLERANCE)
    steps = [_step(model.train(), x, targets) for model in (ours, peer)]
    timing = _compare(*steps)
    return _row(timing, f"FasterViT-{variant} training step, batch {batch}", batch, error, "gradients")


def _gradients(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """All of them in one vector, without stochastic depth, whose draws differ."""
    F.cross_entropy(model.eval()(x), targets).backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.cat([gradients[name] for name in sorted(gradients)])


def _step(model: nn.Module, x: Tensor, targets: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss = F.cross_entropy(model(x), targets, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _compare(ours: Callable[[], object], peer: Callable[[], object]) -> Timing:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return compare(ours, peer, warmup=1, clock=clock)


def _row(timing: Timing, name: str, items: int, error: float, what: str = "logits") -> Row:
    row = Row.of(
        timing,
        name=name,
        peer_name="fastervit 1.0.0",
        checked=f"{what} within {error:.0e}",
        command=COMMAND,
        items=items,
    )
    print(f"{row.name}: {row.ratio} ({row.spread}), {row.ours} against {row.peer}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["0", "2", "4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["eager", "deployed"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    pin_threads(args.threads)
    rows = [row for variant in args.variants for row in inference(variant, args.batches, args.forms)]
    if not args.no_training:
        rows.append(training("0", 8))
    if not args.no_record:
        record(*rows, where=environment("timm", "fastervit"))


if __name__ == "__main__":
    main()
