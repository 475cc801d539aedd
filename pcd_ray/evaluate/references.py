"""kNN of the two networks that do not change while a run trains, kept with what it was measured on.

``eval`` may change when a run goes on: references of other sets would be level lines of nothing.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pcd_ray import metric_names as names
from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config
from pcd_ray.evaluate.eval_sets import crop_size_px

REFERENCES = "references.json"


def stored_references(
    folder: RunFolder, config: Config, sets: Sequence[str] = ()
) -> dict[str, float] | None:
    """Return top-1 in percent of ``teacher`` and ``untrained``; None: not measured as asked now.

    Args:
        folder: of the run.
        config: the run.
        sets: hashes of what the sets hold now; empty: as when they were measured.
    """
    uri = folder.file(REFERENCES)
    stored = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    if stored.get("measured_on") != _measured_on(config):
        return None
    if sets and stored.get("sets") != list(sets):
        return None
    return dict(stored[names.KNN_TOP1])


def store_references(
    folder: RunFolder, config: Config, found: Mapping[str, float], sets: Sequence[str]
) -> None:
    """Write them with the sets, the size of crops and the neighbours that they hold for."""
    content = {
        names.KNN_TOP1: dict(found),
        "measured_on": _measured_on(config),
        "sets": list(sets),
    }
    storage.write_text(folder.file(REFERENCES), json.dumps(content))


def _measured_on(config: Config) -> dict[str, Any]:
    return {
        "knn_train": config.eval.knn_train,
        "knn_test": config.eval.knn_test,
        "knn_k": config.eval.knn_k,
        "image_size_px": crop_size_px(config),
    }
