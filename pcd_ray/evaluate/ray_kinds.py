"""What ``pcd-ray eval`` can do: kNN, linear probe, segmentation, detection."""

from pcd_ray.config import Config
from pcd_ray.evaluate.classify import classify_settings
from pcd_ray.evaluate.classify.ray_classify import judge_knn, judge_linear
from pcd_ray.evaluate.detect import detect_settings
from pcd_ray.evaluate.detect.detection_data import DetectionData
from pcd_ray.evaluate.detect.ray_detection import judge_detection
from pcd_ray.evaluate.finetune.finetune_settings import check_batch
from pcd_ray.evaluate.judging import Kind
from pcd_ray.evaluate.segment import segment_settings
from pcd_ray.evaluate.segment.ray_segmentation import judge_segmentation
from pcd_ray.evaluate.segment.segment_set import SegmentSet, open_segment_set
from pcd_ray.evaluate.side_by_side import classified_images, detected_images, segmented_images


def _labelled_images(config: Config) -> dict[str, str]:
    return {"eval.knn_train": config.eval.knn_train, "eval.knn_test": config.eval.knn_test}


def _open_for_segment(config: Config) -> SegmentSet:
    segment = config.eval.segment
    if segment.method == "fcn":
        check_batch(
            "eval.segment.global_batch_size", segment.global_batch_size, config.train.min_workers
        )
    return open_segment_set(config)


def _notes(opened: SegmentSet | DetectionData, config: Config) -> tuple[str, ...]:
    del config
    return opened.notes


def _segment_title(config: Config) -> str:
    if config.eval.segment.method == "fcn":
        return "Semantic segmentation, fine-tuned as an FCN"
    return "Semantic segmentation, linear probe on the frozen map"


def _detect_title(config: Config) -> str:
    if config.eval.detect.masks:
        return "Detection and instance segmentation, fine-tuned Mask R-CNN"
    return "Detection, fine-tuned Faster R-CNN"


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="knn",
            title=lambda _: "kNN on frozen, pooled features",
            format=1,
            sets=_labelled_images,
            open=classify_settings.open_for_knn,
            notes=classify_settings.knn_notes,
            facts=classify_settings.knn_facts,
            contents=classify_settings.contents_of,
            judge=judge_knn,
            images=classified_images,
            draws=False,
        ),
        Kind(
            name="linear",
            title=lambda _: "Linear probe on frozen, pooled features",
            format=2,
            sets=_labelled_images,
            open=classify_settings.open_images,
            notes=classify_settings.linear_notes,
            facts=classify_settings.linear_facts,
            contents=classify_settings.contents_of,
            judge=judge_linear,
            images=classified_images,
        ),
        Kind(
            name="segment",
            title=_segment_title,
            format=1,
            sets=lambda config: {"eval.segmentation": config.eval.segmentation},
            open=_open_for_segment,
            notes=_notes,
            facts=segment_settings.segment_facts,
            contents=lambda opened: opened.sha256,
            judge=judge_segmentation,
            images=segmented_images,
            method=lambda config: config.eval.segment.method,
            fine_tunes=lambda config: config.eval.segment.method == "fcn",
        ),
        Kind(
            name="detect",
            title=_detect_title,
            format=2,
            sets=lambda config: {"eval.detect.data": config.eval.detect.data},
            open=detect_settings.open_detection_set,
            notes=_notes,
            facts=detect_settings.detect_facts,
            contents=detect_settings.contents_of,
            judge=judge_detection,
            images=detected_images,
            method=lambda config: "mask_rcnn" if config.eval.detect.masks else "faster_rcnn",
            fine_tunes=lambda _: True,
        ),
    )
}
"""By name."""
