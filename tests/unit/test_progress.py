from pcd_ray.evaluate.progress import Progress


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
