"""Names that stand in files stay inside the folder that they belong to."""

import pytest

from pcd_ray.uris import OutsideError, inside

FOLDERS = ("/data/shards", "s3://bucket/shards?endpoint_override=h:1&scheme=http")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_name_inside_is_joined(folder: str) -> None:
    base, mark, query = folder.partition("?")
    for name, path in (
        ("a.jpg", "a.jpg"),
        ("a b/100%.jpg", "a b/100%.jpg"),
        ("./x/../a.jpg", "a.jpg"),
        ("..a/...", "..a/..."),
        ("12:30.jpg", "12:30.jpg"),
    ):
        assert inside(folder, name) == f"{base}/{path}{mark}{query}"


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a.jpg",
        "x/../../a.jpg",
        "..\\a.jpg",
        "/etc/passwd",
        "\\\\host\\a.jpg",
        "C:\\a.jpg",
        "~/a.jpg",
        "file:///etc/passwd",
        "s3://other/a.jpg",
        "a\0.jpg",
        None,
        7,
    ],
)
def test_a_name_that_leads_out_is_refused_in_words(folder: str, name: object) -> None:
    with pytest.raises(OutsideError, match=r"is no place inside .*shards.*do not trust the file"):
        inside(folder, name)


def test_a_query_cannot_be_smuggled_in_by_a_name() -> None:
    with pytest.raises(OutsideError):
        inside("s3://bucket/shards", "a.jpg?endpoint_override=elsewhere")
    assert inside("/data", "what?.jpg") == "/data/what?.jpg"
