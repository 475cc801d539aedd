"""Time and extra memory of the loss, forward and backward: plain, fused, chunked.

Run: python tests/benchmarks/bench_loss.py [--pixels 1568 --width 256 --queue 65536 --device cpu]

Extra memory is the peak above what the process holds before the step (inputs made, kernels warm):
each form is measured in a process of its own. On CPU it is the resident set, read from /proc
(Linux), on CUDA torch's own count.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import in_turn, median_ratio, print_circumstances, print_table, spread
from torch import Tensor

from pcd_ray.distill.loss import IMPLEMENTATIONS, choose_implementation, contrastive_loss

TEMPERATURE = 0.2
WARM_PIXELS, WARM_QUEUE = 32, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=1568, help="student pixels P")
    parser.add_argument("--width", type=int, default=256, help="embedding width D")
    parser.add_argument("--queue", type=int, default=65_536, help="negatives K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(extra_bytes(options.memory_of, options)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure all forms and print the table."""
    device = torch.device(options.device)
    for name in IMPLEMENTATIONS:  # refuses a form that this machine does not have
        choose_implementation(name, width=options.width, device=device)
    inputs = unit_inputs(options.pixels, options.width, options.queue, device)
    deviations = gradient_deviations(inputs)
    seconds = in_turn(
        {name: partial(timed_step, name, inputs) for name in IMPLEMENTATIONS},
        repeats=options.repeats,
    )
    extra = in_turn(
        {name: partial(extra_mib_elsewhere, name) for name in IMPLEMENTATIONS},
        repeats=min(3, options.repeats),
    )
    print(f"loss forward + backward: P={options.pixels} D={options.width} K={options.queue}")
    print_table(
        ("form", "seconds", "times plain", "extra MiB", "times plain", "gradient vs plain"),
        [
            (
                name,
                spread(seconds[name]),
                f"{median_ratio(seconds[name], seconds['plain']):.3f}",
                spread(extra[name]),
                f"{median_ratio(extra[name], extra['plain']):.3f}",
                f"{deviations[name]:.1e}",
            )
            for name in IMPLEMENTATIONS
        ],
    )
    fused = median_ratio(seconds["plain"], seconds["fused"])
    print(f"fused is {fused:.2f} times as fast as plain")
    print_circumstances(threads=options.threads)


def unit_inputs(pixels: int, width: int, queue: int, device: torch.device) -> list[Tensor]:
    """Return student (P, D) that wants a gradient, positives (P, D) and negatives (K, D)."""
    random = torch.Generator().manual_seed(0)
    student, positive, negatives = (
        F.normalize(torch.randn(rows, width, generator=random), dim=1).to(device)
        for rows in (pixels, pixels, queue)
    )
    return [student.requires_grad_(), positive, negatives]


def step(name: str, inputs: list[Tensor]) -> Tensor:
    """Compute the loss and its gradient; return the gradient."""
    student, positive, negatives = inputs
    loss = contrastive_loss(
        student, positive, negatives, temperature=TEMPERATURE, implementation=name
    )
    (gradient,) = torch.autograd.grad(loss, student)
    if gradient.device.type == "cuda":
        torch.cuda.synchronize()
    return gradient


def gradient_deviations(inputs: list[Tensor]) -> dict[str, float]:
    """Return the largest deviation from the plain gradient, relative to its largest entry."""
    plain = step("plain", inputs)
    scale = plain.abs().max()
    return {
        name: float((step(name, inputs) - plain).abs().max() / scale) for name in IMPLEMENTATIONS
    }


def timed_step(name: str, inputs: list[Tensor]) -> float:
    """Return the seconds of a step."""
    started = time.perf_counter()
    step(name, inputs)
    return time.perf_counter() - started


def extra_mib_elsewhere(name: str) -> float:
    """Return the extra memory of one form, measured by a new process with the same options."""
    result = subprocess.run(
        [sys.executable, *sys.argv, "--memory-of", name],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(result.stdout)) / 2**20


def extra_bytes(name: str, options: argparse.Namespace) -> int:
    """Return the peak memory of one step in this process, above what it holds before."""
    device = torch.device(options.device)
    step(name, unit_inputs(WARM_PIXELS, options.width, WARM_QUEUE, device))
    inputs = unit_inputs(options.pixels, options.width, options.queue, device)
    before, peak = resident_meter() if device.type == "cpu" else cuda_meter()
    step(name, inputs)
    return peak() - before


def resident_meter() -> tuple[int, Callable[[], int]]:
    """Forget the resident set's peak; return the set's size now and a reader of its new peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_bytes("VmRSS"), partial(_resident_bytes, "VmHWM")


def cuda_meter() -> tuple[int, Callable[[], int]]:
    """The same for torch's memory on CUDA."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; run this on Linux")


if __name__ == "__main__":
    main()
