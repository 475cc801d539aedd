"""An error keeps its kind and its words on its way from one process to another."""

import importlib
import json
import pickle
import pkgutil

import pytest

import pcd_ray
from pcd_ray.data.ray_stream import _checked, _guarded
from pcd_ray.errors import PcdError, from_plain, to_plain


def kinds() -> list[type[PcdError]]:
    """Return every class of errors in the package, wherever it is defined."""
    for module in pkgutil.walk_packages(pcd_ray.__path__, "pcd_ray."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: list[type[PcdError]] = [PcdError]
    for kind in found:
        found += [each for each in kind.__subclasses__() if each.__module__.startswith("pcd_ray.")]
    return found


def test_every_kind_of_error_arrives_as_what_it_was() -> None:
    assert len(kinds()) > 10
    for kind in kinds():
        error = kind("shards/\xe9.arrow:\n\tdamaged")
        sent = json.loads(json.dumps(to_plain(error)))
        for arrived in (from_plain(sent), pickle.loads(pickle.dumps(error))):
            assert type(arrived) is kind
            assert (arrived.args, vars(arrived)) == (error.args, vars(error))


def test_names_of_errors_are_unique() -> None:
    names = [kind.__name__ for kind in kinds()]
    assert len(set(names)) == len(names)


def test_every_kind_of_error_of_a_data_task_is_raised_where_its_block_is_taken() -> None:
    for kind in kinds():

        def work(_: object, kind: type[PcdError] = kind) -> dict[str, object]:
            raise kind("shard_0 is away")

        with pytest.raises(PcdError, match=r"^shard_0 is away$") as raised:
            _checked(_guarded(work, {}))  # type: ignore[arg-type]
        assert type(raised.value) is kind


def test_an_unknown_kind_keeps_its_words() -> None:
    error = from_plain({"kind": "LaterError", "message": "of a newer version"})
    assert (type(error), str(error)) == (PcdError, "of a newer version")
