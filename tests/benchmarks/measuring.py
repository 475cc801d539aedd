"""How all benchmarks measure and print: variants in turn, medians, ratios, where and with what."""

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def in_turn(variants: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, list[float]]:
    """Call each variant once per round, so that a busy spell of the machine hits them alike.

    The order turns round with each round. Returns what each variant returned, one per round.
    """
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        names = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in names:
            measured[name].append(variants[name]())
            print(
                f"  round {number + 1}/{repeats} {name}: {measured[name][-1]:.4g}", file=sys.stderr
            )
    return measured


def spread(values: Sequence[float]) -> str:
    """Return ``median (lowest-highest)``."""
    return f"{statistics.median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the ratio of the medians."""
    return statistics.median(values) / statistics.median(base)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def print_circumstances(*, threads: int) -> None:
    """Print the machine, its load, versions, threads and the command."""
    load = os.getloadavg()[0]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"machine: {_processor()}, {os.cpu_count()} CPUs{gpu}, load {load:.1f}")
    print(f"torch {torch.__version__}, {threads} threads, Python {platform.python_version()}")
    print(f"command: python {shlex.join(sys.argv)}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
