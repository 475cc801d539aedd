"""Pictures of a comparison: each one costs itself alone."""

import numpy as np
from judged import drawn_network
from PIL import Image
from tiny import tiny_config

from pcd_ray.distill.build import build_student
from pcd_ray.evaluate.side_by_side import look_pictures


def test_a_picture_that_fails_costs_itself_alone() -> None:
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (40, 40, 3)).astype(np.uint8) for _ in range(2)]
    config = tiny_config(student={"mhsa": {"depth": 0}})
    without_neck = build_student(config, []).eval()  # its attention cannot be drawn
    drawn, failed = look_pictures(
        [drawn_network("test_resnet")],
        [Image.fromarray(each) for each in pixels],
        pixel=(0.5, 0.5),
        size_px=32,
        necks={"drawn": without_neck},
    )
    others = ["pca_maps.png", "similarity.png", "similarity_across.png", "receptive_fields.png"]
    assert list(drawn) == others
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    assert list(failed) == ["attention_drawn.png"]
    assert failed["attention_drawn.png"].startswith("ValueError: ")
