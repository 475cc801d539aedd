import threading

import pytest

from pcd_ray import progress as module
from pcd_ray.progress import Progress, counted, progress, sending_to


def test_a_line_says_what_is_done_and_how_long_the_rest_takes() -> None:
    seconds = iter([0.0, 4, 12, 20])
    shown = Progress("features of a", "images", 4000, clock=lambda: next(seconds))
    assert shown.text == "features of a: 0 of 4,000 images, 4 s so far"
    shown.add(2000)
    assert shown.text == "features of a: 2,000 of 4,000 images, 166.7 images/s, 12 s left"
    seconds = iter([0.0, 31])
    assert Progress("drawing", clock=lambda: next(seconds)).text == "drawing: 31 s so far"


def test_lines_come_while_one_step_takes_long_and_parts_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    lines: list[str] = []
    seen = threading.Event()

    def listen(line: str) -> None:
        lines.append(line)
        seen.set()

    with sending_to(listen), progress("segmentation", "networks", 3) as networks:
        networks.add()
        for step in counted(range(2), "features", "images", 2):
            if step == 1:
                seen.clear()
                assert seen.wait(60)
                assert seen.wait(60)
    outer, inner = [line for line in lines if "|" in line][-1].split(" | ")
    assert outer.strip().startswith("segmentation: 1 of 3 networks")
    assert inner.startswith("features: 1 of 2 images")
    count = len(lines)
    with progress("short"):
        pass
    assert len(lines) == count
