"""The table of published teachers: each release at its real size, read, checked, one step trained.

Run: python tests/benchmarks/table_teachers.py [NAME ...]

The files are made on the spot in the published layouts with random values, since the originals are
not at hand. A row fails with its error instead of numbers.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import torch
from measuring import print_circumstances

sys.path.append(str(Path(__file__).parents[1]))  # where the layouts are
from published import ROWS, save

from pcd_ray.config import Config, config_from_values
from pcd_ray.distill.build import build_method
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.spatial_adaptor import layer_names
from pcd_ray.distill.step import ViewBatch, distill_step
from pcd_ray.inspection import inspect

IMAGE_PX, IMAGES = 64, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows; all by default")
    options = parser.parse_args()
    print("| file | recognised | head | keys left over | law error | loss of one step |")
    print("|---|---|---|---|---|---|")
    for name in options.names or ROWS:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            path = save(ROWS[name].published().content, Path(folder) / "file.pth")
            print(f"| {name} | " + " | ".join(measured(path)) + " |", flush=True)
        gc.collect()
    print_circumstances(threads=torch.get_num_threads())


def measured(path: str) -> tuple[str, ...]:
    """Return what was recognised, the head, keys left over, law error and the first loss."""
    facts = inspect(path).facts
    config = run_of(path)
    loaded = load_teacher(config.teacher)  # refuses a file with a key that is not used or named
    method = build_method(config, [(loaded, None)], device=torch.device("cpu"))
    (branch,) = method.branches
    images = torch.randint(0, 256, (IMAGES, IMAGE_PX, IMAGE_PX, 3), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, IMAGE_PX, IMAGE_PX, 0]]).repeat(IMAGES, 1)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.1)
    batch = ViewBatch(images, images, boxes, boxes)
    (result,) = distill_step(method.student.train(), method.branches, batch)
    result.loss.backward()
    optimizer.step()
    finite = all(bool(torch.isfinite(p).all()) for p in method.student.parameters())
    return (
        f"{facts['method']}, {loaded.identity.arch}",
        ", ".join(layer_names(list(branch.teacher.adaptor.head))),
        "0",
        f"{branch.law_error:.0e}",
        f"{result.loss.item():.2f}" if finite else "not finite",
    )


def run_of(path: str) -> Config:
    """Return the run that the row is tried with."""
    return config_from_values(
        {
            "teacher": {"weights": path},
            "student": {"backbone": "resnet18", "head_hidden": 256, "predictor": False},
            "augment": {"image_size_px": IMAGE_PX},
            "loss": {"queue_size": 64},
            "train": {"global_batch_size": IMAGES},
        }
    )


if __name__ == "__main__":
    main()
