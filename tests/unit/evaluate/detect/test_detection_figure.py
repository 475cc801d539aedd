"""What is drawn of detections, and in which colours."""

import io

import numpy as np
from PIL import Image

from pcd_ray.evaluate.detect.detection_figure import Marked, detection_grid, marked_from_results

LABELS = {3: 0, 7: 1}


def result(score: float, category_id: int = 3) -> dict[str, object]:
    return {"image_id": 1, "category_id": category_id, "bbox": [2.0, 3, 10, 20], "score": score}


def test_confident_detections_are_drawn_and_the_best_one_always() -> None:
    marked = marked_from_results([result(0.2), result(0.9, 7), result(0.6)], LABELS)
    assert marked.scores == [0.9, 0.6]
    assert marked.labels == [1, 0]
    assert marked.boxes.tolist() == [[2, 3, 12, 23]] * 2
    assert marked_from_results([result(0.2), result(0.3)], LABELS).scores == [0.3]
    assert marked_from_results([], LABELS).boxes.shape == (0, 4)


def test_masks_are_seen_in_their_classs_colour() -> None:
    image = Image.new("RGB", (60, 40), (255, 255, 255))
    square = np.array([[0.0, 0], [60, 0], [60, 40], [0, 40]])
    nothing = marked_from_results([], LABELS)

    def drawn(label: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        truth = Marked(
            boxes=np.array([[0.0, 0, 60, 40]]), labels=[label], scores=[None],
            segmentations=[(square,)],
        )  # fmt: skip
        png = detection_grid([image], [truth], [nothing], ("red", "blue"))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    one, other = drawn(0), drawn(1)
    assert one.shape == other.shape
    middle = one.shape[0] // 2
    for colour, pixels in (((136, 204, 238), one), ((204, 102, 119), other)):
        veiled = (np.array(colour) + 255) / 2
        place = pixels[middle, pixels.shape[1] // 4]
        assert np.abs(place - veiled).max() <= 2
        assert pixels[middle, 3 * pixels.shape[1] // 4].tolist() == [255, 255, 255]
