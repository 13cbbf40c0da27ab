"""From the cost of a step to one GPU, to a run, and to a report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch import nn

from restrike.models import build
from restrike.plan import DEVICES, GpuMemory, Parallelism, StepCost, memory_per_gpu
from restrike.plan.devices import Device
from restrike.plan.estimate import Loading, Phase, calibrated_efficiency, estimate_run, roofline_s, step_seconds
from restrike.plan.kernels import device_kernels
from restrike.plan.memory import most_that_fits
from restrike.plan.report import PhaseSummary, Plan, as_json, as_text, save_plot
from restrike.plan.trace import Operation, Trace

A100 = DEVICES["a100-80"]
# Images per second on an A100 at batch 128: arXiv 2306.06189, Table 1.
PUBLISHED_RATES = {0: 5802, 1: 4188, 2: 3161, 3: 1780, 4: 849, 5: 449, 6: 352}


@pytest.mark.parametrize("variant", PUBLISHED_RATES)
def test_the_roofline_gives_the_published_inference_rates(variant):
    with torch.device("meta"):
        net = build(f"faster_vit_{variant}_224").eval()
        images = torch.empty(128, 3, 224, 224)
    with torch.no_grad(), Trace() as trace, device_kernels("cuda", torch.float16):
        net(images)
    rate = 128 / roofline_s(trace.operations, A100, tf32=True)
    assert rate == pytest.approx(PUBLISHED_RATES[variant], rel=0.15)


COST = StepCost(
    flops=30 * 10**12,
    forward_flops=10**13,
    operations=Counter({Operation(10**13, 10**9, True): 3, Operation(0, 10**9, False): 10}),
    peak=Counter(weights=400, gradients=100, optimizer=800, average=400, batch=10, activations=5000),
    peak_without_gradients=Counter(weights=400, gradients=300, optimizer=800, average=400, batch=10, activations=5200),
    saved_bytes=4900,
    all_gradients=400,
)


def test_ddp_keeps_all_gradients_once_or_twice():
    single = memory_per_gpu(COST, Parallelism(), overhead=0)
    views = memory_per_gpu(COST, Parallelism("ddp", 8, bucket_views=True), overhead=0)
    copies = memory_per_gpu(COST, Parallelism("ddp", 8), overhead=0)
    assert single.total == 6710
    assert (views.gradients, views.gathered, views.activations) == (400, 0, 5200)
    assert copies.total == single.total + 400
    assert memory_per_gpu(COST, Parallelism()).total == single.total + 10**9


def test_fsdp_splits_all_state_and_gathers_blocks():
    net = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(3)), nn.Linear(10, 1, bias=False))
    parallelism = Parallelism.fsdp(4, net, list(net)[:3])
    assert (parallelism.largest_block_bytes, parallelism.unblocked_bytes) == (400, 40)
    memory = memory_per_gpu(COST, parallelism, overhead=0)
    assert (memory.weights, memory.optimizer, memory.gradients) == (100, 200, 100)
    assert memory.gathered == 3 * 400 + 40
    assert memory.activations == 5200


def test_time_follows_utilisation_or_the_slower_of_arithmetic_and_memory():
    arithmetic, traffic = 3 * 10**13 / A100.flops_half, 10 * 10**9 / A100.bandwidth
    assert step_seconds(COST.operations, A100, False, utilisation=0.5) == pytest.approx(2 * arithmetic)
    assert step_seconds(COST.operations, A100, False, efficiency=1.0) == pytest.approx(arithmetic + traffic)
    efficiency = calibrated_efficiency(0.5, COST.operations, A100, False)
    assert step_seconds(COST.operations, A100, False, efficiency=efficiency) == pytest.approx(0.5)


def test_an_operator_takes_no_less_than_its_launch():
    assert roofline_s(Counter({Operation(1, 1, False): 1000}), A100, False) == pytest.approx(1000 * A100.launch_s)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_calibration_gives_its_own_time_back_beside_launches(overlaps):
    machine = Device("slow", 0, 1e12, 1e12, 1e12, 1e11, launch_s=1e-3, overlaps=overlaps)
    small = Counter({Operation(10**9, 10**6, False): 50, Operation(0, 10**4, False): 100})
    seconds = 0.4
    efficiency = calibrated_efficiency(seconds, small, machine, False)
    assert roofline_s(small, machine, False, efficiency) == pytest.approx(seconds, rel=1e-6)


def test_a_cpu_spends_launches_beside_its_work_and_a_gpu_hides_them():
    work = Counter({Operation(10**10, 1, False): 1})
    gpu = Device("gpu", 0, 1e13, 1e13, 1e13, 1e12, launch_s=1e-3)
    cpu = dataclasses.replace(gpu, overlaps=False)
    assert roofline_s(work, gpu, False, 1.0) == pytest.approx(1e-3)
    assert roofline_s(work, cpu, False, 1.0) == pytest.approx(2e-3)


@pytest.mark.parametrize(("room", "most"), [(1000, 8), (10**6, 999), (150, 0)])
def test_the_largest_size_that_fits_is_found(room, most):
    asked = []

    def total(size: int) -> int:
        asked.append(size)
        return 200 + 1000 * size if room > 10**5 else 200 + 100 * size

    found = most_that_fits(total, room, 4000, total(4000))
    assert most * 0.97 <= found <= most and len(asked) <= 14


def test_float32_products_use_tf32_only_where_it_is_allowed():
    products = Counter({Operation(10**13, 1, False): 1})
    ratio = roofline_s(products, A100, False) / roofline_s(products, A100, True)
    assert ratio == pytest.approx(A100.flops_tf32 / A100.flops_float32)


def test_a_run_adds_its_phases_up():
    device = Device("round", 10**10, 1e13, 1e13, 1e13, 1e30, launch_s=0.0)
    phases = [
        Phase("first", 360, Counter({Operation(10**13, 1, True): 1})),
        Phase("second", 360, Counter({Operation(2 * 10**13, 1, True): 1})),
    ]
    run = estimate_run(
        phases, device, tf32=False, ranks=8, nodes=2, samples_per_step=4096, utilisation=0.5, price_per_gpu_hour=3.0,
        loading=Loading(samples_per_core_s=1024.0, bytes_per_sample=1000.0),
    )  # fmt: skip
    assert run.steps == 720 and run.step_s == pytest.approx(4.0)
    assert run.hours == pytest.approx((360 * 2 + 360 * 4) / 3600)
    assert run.gpu_hours == pytest.approx(8 * run.hours) and run.price == pytest.approx(3 * run.gpu_hours)
    assert run.utilisation == pytest.approx(0.5)
    assert [(part.name, part.step_s) for part in run.phases] == [("first", 2.0), ("second", 4.0)]
    assert run.samples_per_s == pytest.approx(4096 / 2.0)  # of the faster phase, which the loaders must follow
    assert run.loader_cores == pytest.approx(1.0) and run.bytes_per_s == pytest.approx(1024e3)


def plan(**changes: object) -> Plan:
    memory = GpuMemory(10**9, 10**9, 2 * 10**9, 0, 10**7, 20 * 10**9)
    made = Plan(
        recipe="r", device=A100, layout="1 node(s) x 1 device(s), single", precision="bf16-mixed",
        parameters=250_000_000, trained=1_000_000, batch="32 per GPU", batch_size_per_device=32, samples_per_step=32,
        flops_per_sample=1.5e12, forward_flops_per_sample=0.5e12,
        flops_per_step=48 * 10**12, memory=memory, saved_bytes=1, run=None,
        curve={16: dataclasses.replace(memory, activations=10**10), 32: memory}, notes=("an assumption",),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_the_report_says_whether_it_fits_and_what_was_assumed(tmp_path):
    text = as_text(plan())
    assert "25.01 GB of 80.00 GB: fits" in text and "250.0 M, 1.0 M of them trained" in text
    assert "1.5 TFLOP per sample" in text and "an assumption" in text and "EMA" not in text
    small = plan(device=dataclasses.replace(A100, memory_bytes=24 * 10**9))
    assert not small.fits and "DOES NOT FIT" in as_text(small)
    refused = dataclasses.replace(small, fits_up_to="data.batch_size_per_device 12 fits")
    assert "DOES NOT FIT; data.batch_size_per_device 12 fits" in as_text(refused)
    record = json.loads(as_json(small))
    assert record["fits"] is False and record["memory"]["total"] == 25_010_000_000
    assert record["curve"]["16"]["total"] == 15_010_000_000
    stages = tuple(PhaseSummary(f"from step {n}", 10, 5, 7, plan().memory) for n in (0, 10))
    assert as_text(plan(phases=stages)).count("\nphase ") == 2
    assert json.loads(as_json(plan(phases=stages)))["phases"][1]["memory"]["total"] == 25_010_000_000
    save_plot(plan(), tmp_path / "new" / "memory.png")
    assert (tmp_path / "new" / "memory.png").read_bytes()[:4] == b"\x89PNG"
