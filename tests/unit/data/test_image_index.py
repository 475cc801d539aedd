"""The image index: class names travel with it, labels are translated by name."""

import pyarrow as pa

from pcd_ray.data.image_index import (
    INDEX_SCHEMA,
    classes_of,
    column,
    relabelled,
    repeated_keys,
    with_classes,
)


def _index(keys: list[str], labels: list[int]) -> pa.Table:
    count = len(keys)
    columns = [keys, labels, keys, [0] * count, [1] * count, [0] * count]
    return pa.table(dict(zip(INDEX_SCHEMA.names, columns, strict=True)), schema=INDEX_SCHEMA)


def test_class_names_travel_with_the_index() -> None:
    index = with_classes(_index(["a", "b"], [0, 1]), ["owl", "\u0107evap"])
    assert classes_of(index) == ("owl", "\u0107evap")
    assert classes_of(index.take(pa.array([1])).combine_chunks()) == ("owl", "\u0107evap")
    assert classes_of(_index(["a"], [-1])) == ()


def test_relabelling_goes_by_name_and_keeps_the_unlabelled() -> None:
    index = with_classes(_index(["a", "b", "c", "d"], [0, 1, 2, -1]), ["ant", "bee", "cow"])
    other = relabelled(index, ["cow", "ant"])
    assert column(other, "label").tolist() == [1, -1, 0, -1]
    assert classes_of(other) == ("cow", "ant")
    assert relabelled(other, ["cow", "ant"]).equals(other, check_metadata=True)


def test_repeated_keys_are_found() -> None:
    assert repeated_keys(_index(["b", "a", "b", "c", "a", "b"], [0] * 6)) == ["a", "b"]
    assert repeated_keys(_index(["a", "b"], [0, 0])) == []
