"""Where ``pcd-ray eval`` writes: pages beside the first run judged, parts in one place for all.

    RUN/eval/KIND[-METHOD]-SET-PROTOCOL/   report.html, summary.json, figures/
    ROOT/eval/parts/                       see `judging`

A page's folder holds one protocol: that of a probe is not overwritten by one of an FCN, of other
options, or of another set. Parts are known by network and protocol, so that every page can use
them.
"""

from collections.abc import Mapping

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config

_HASH = 8  # characters of a protocol that name a folder
_CHECKPOINTS = "checkpoints"


def out_folder(first: str, config: Config) -> str:
    """Return the folder of pages: in the first run judged, else beside all runs."""
    if config.eval.out:
        return storage.absolute(config.eval.out)
    return storage.join(_run_of(first) or storage.absolute(config.run.root), "eval")


def parts_folder(first: str, config: Config) -> str:
    """Return the folder of what is stored: beside the first run judged, else beside all runs."""
    if config.eval.out:
        return storage.join(storage.absolute(config.eval.out), "parts")
    run = _run_of(first)
    root = storage.parent(run) if run else storage.absolute(config.run.root)
    return storage.join(root, "eval", "parts")


def page_name(kind: str, method: str, sets: Mapping[str, str], protocol: str) -> str:
    """Return the name of a page's folder.

    Args:
        kind: ``knn``, ``segment`` and so on.
        method: where the kind has several; else empty.
        sets: option -> URI of the labelled sets.
        protocol: its hash.
    """
    places = [storage.absolute(uri) for uri in sets.values()]
    above = {storage.parent(place) for place in places}
    several = len(set(places)) > 1 and len(above) == 1  # parts of one set, such as train and val
    name = storage.name_of(above.pop() if several else places[0])
    safe = "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in name)
    return "-".join(filter(None, [kind, method, safe, protocol[:_HASH]]))


def _run_of(spec: str) -> str:
    """Return the folder of the run that a network is called by; empty: it is of none."""
    place = storage.absolute(spec)
    if storage.is_folder(RunFolder(place).checkpoints):
        return place
    above = storage.parent(place)  # of one of its checkpoints
    if storage.is_folder(place) and storage.name_of(above) == _CHECKPOINTS:
        return storage.parent(above)
    return ""
