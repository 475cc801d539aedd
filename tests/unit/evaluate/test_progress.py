import threading

import pytest

from pcd_ray.evaluate.progress import Progress, Watch


def test_a_line_is_given_after_ten_seconds_and_at_the_end() -> None:
    seconds = iter([0.0, 4, 12, 14, 20])
    progress = Progress("features of a", "images", 4000, clock=lambda: next(seconds))
    lines = [progress.line(1000) for _ in range(4)]
    assert lines == [
        "",
        "  features of a: 2,000 of 4,000 images, 166.7 images/s, 12 s left",
        "",
        "  features of a: 4,000 of 4,000 images, 200.0 images/s, 20 s",
    ]


def test_a_watch_says_what_goes_on_and_how_far_it_is() -> None:
    said: set[str] = set()
    counted = threading.Event()

    def say(text: str) -> None:
        said.add(text.rpartition(", ")[0])
        if "9 of 10" in text:
            counted.set()

    with Watch("features of a", say, total=10, done=1, every_s=0.01) as watch:
        for _ in watch.counted([[1, 2], [3, 4]], len, each=2):
            pass
        assert counted.wait(30)
    assert "  features of a: 9 of 10 images" in said


def test_a_watch_says_nothing_of_what_ends_soon_and_ends_with_an_error() -> None:
    said: list[str] = []
    threads = threading.active_count()
    with pytest.raises(ValueError, match="wrong"), Watch("features", said.append):
        raise ValueError("wrong")
    assert (said, threading.active_count()) == ([], threads)
