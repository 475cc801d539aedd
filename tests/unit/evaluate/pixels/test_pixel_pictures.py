import torch
from networks import small_backbone
from tiny import images
from torch import nn

from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.distill.student import Student
from pcd_ray.evaluate.pixels.pixel_pictures import draw_pixel_pictures

IMAGES = images(0, 2, 64)
NETWORKS = {"untrained": small_backbone(0, 8).eval(), "student": small_backbone(1, 8).eval()}
BARE = {"similarity.png", "similarity_across.png", "receptive_fields.png"}


def _necked(name: str) -> Student:
    neck = MhsaNeck(8, depth=1, heads=2)
    nn.init.normal_(neck[0].projection.weight, generator=torch.Generator().manual_seed(0))
    return Student(NETWORKS[name], neck, []).eval()


def test_attention_is_drawn_of_necks_alone_and_only_fields_see_them_besides() -> None:
    bare = draw_pixel_pictures(NETWORKS, IMAGES)
    assert set(bare) == BARE
    necked = draw_pixel_pictures(NETWORKS, IMAGES, necks={"student": _necked("student")})
    assert set(necked) == BARE | {"attention_student.png"}
    assert {name for name in BARE if bare[name] != necked[name]} == {"receptive_fields.png"}


def test_the_pixel_matters_where_it_is_asked_about() -> None:
    necks = {"student": _necked("student")}
    first = draw_pixel_pictures(NETWORKS, IMAGES.numpy(), pixel=(0, 0), necks=necks)
    last = draw_pixel_pictures(NETWORKS, IMAGES, pixel=(1, 1), necks=necks)
    assert {name for name in first if first[name] == last[name]} == {"receptive_fields.png"}


def test_a_single_image_is_compared_with_none() -> None:
    assert set(draw_pixel_pictures(NETWORKS, IMAGES[:1])) == BARE - {"similarity_across.png"}


def test_names_of_files_hold_no_signs_of_paths() -> None:
    student = _necked("student")
    drawn = draw_pixel_pictures(
        {"runs/a (2)": NETWORKS["student"]}, IMAGES[:1], necks={"runs/a (2)": student}
    )
    assert "attention_runs_a_2_.png" in drawn
