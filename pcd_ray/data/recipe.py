"""Config -> how an image becomes views."""

from pcd_ray.config import AugmentConfig
from pcd_ray.data.augment import ViewRecipe


def recipe_from(augment: AugmentConfig, pairing_kind: str) -> ViewRecipe:
    """Return the recipe of a configuration: two crops for all pairings but ``same_view``."""
    two_crops = pairing_kind != "same_view"
    return ViewRecipe(
        image_size_px=augment.image_size_px,
        min_scale=augment.min_scale,
        max_scale=augment.max_scale,
        flip_prob=augment.flip_prob,
        jitter_prob=augment.jitter_prob,
        brightness=augment.brightness,
        contrast=augment.contrast,
        saturation=augment.saturation,
        hue=augment.hue,
        grey_prob=augment.grey_prob,
        student_blur_prob=augment.student_blur_prob,
        teacher_blur_prob=augment.teacher_blur_prob,
        student_solarize_prob=augment.student_solarize_prob,
        teacher_solarize_prob=augment.teacher_solarize_prob,
        swap_colors=augment.swap_colors,
        two_crops=two_crops,
        two_colours=two_crops or augment.photometric == "independent",
    )
