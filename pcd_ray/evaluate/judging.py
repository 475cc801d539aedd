"""Judge rows of networks part by part: what is done is stored, and read the next time.

    OUT/parts/NETWORK/               what serves all kinds and seeds: features
    OUT/parts/NETWORK/KIND-PROTOCOL/seed_N/scores.json

``NETWORK`` is a hash of weights and normalisation, ``PROTOCOL`` one of the options and of the
labelled sets that numbers follow from: nothing that has changed is read.
"""

import base64
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from PIL import Image

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, config_to_values
from pcd_ray.errors import PcdError
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import JudgedNetwork, Row

_HASH = 16  # characters of a hash that name a folder


class Judge(Protocol):
    """Judges one network with one seed."""

    def __call__(
        self, network: JudgedNetwork, config: Config, *, folder: str, seed: int, device: str
    ) -> Scores:
        """Return its scores; ``folder`` keeps what may be used again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to judge a network."""

    name: str
    title: str
    judge: Judge
    options: tuple[str, ...]
    """Options and sections of ``eval`` that its numbers follow from."""
    sets: Callable[[Config], Mapping[str, str]]
    """The labelled sets that it needs: option -> URI."""
    check: Callable[[Config], object]
    """Refuses sets that cannot be used, before anything is judged."""
    images: Callable[[Config], list[Image.Image]]
    """A few images of those sets, for pictures."""
    draws: bool = True
    """Whether another seed gives another number."""
    on_features: bool = False
    """Whether it works on stored features, which all kinds and seeds of a network share."""


def out_folder(first: str, config: Config) -> str:
    """Return the folder of pages and parts: in the first run judged, else beside all runs."""
    if config.eval.out:
        return storage.absolute(config.eval.out)
    run = storage.absolute(first)
    if not storage.is_folder(RunFolder(run).checkpoints):
        run = storage.absolute(config.run.root)
    return storage.join(run, "eval")


def judge_rows(
    kind: Kind, rows: Sequence[Row], config: Config, *, out: str, device: str
) -> tuple[dict[str, list[Scores]], dict[str, str]]:
    """Judge all networks with all seeds; one that fails costs itself alone.

    Args:
        kind: how.
        rows: what.
        config: sets and protocol.
        out: folder of the parts.
        device: ``cpu`` or ``cuda``.

    Returns:
        Row -> its measurements, and what could not be judged -> why.
    """
    protocol = protocol_of(kind, config)
    measured: dict[str, list[Scores]] = {row.label: [] for row in rows}
    failures: dict[str, str] = {}
    for row, network, seed in _tasks(kind, rows, config):
        place = storage.join(out, "parts", network.identity[:_HASH])
        part = storage.join(place, f"{kind.name}-{protocol[:_HASH]}", f"seed_{seed}")
        scores = stored_scores(part)
        if scores is None:
            _say(f"{kind.title}: {row.label} ({network.source}), seed {seed}")
            folder = place if kind.on_features else part
            started = time.monotonic()
            try:
                scores = kind.judge(network, config, folder=folder, seed=seed, device=device)
            except PcdError as error:
                failures[f"{row.label}, seed {seed}"] = " ".join(str(error).splitlines())
                continue
            scores.about["seconds"] = round(time.monotonic() - started, 1)
            store_scores(part, scores)
        measured[row.label].append(scores)
        _say(f"  {row.label}, seed {seed}: {_headline(scores)}")
    return measured, failures


def protocol_of(kind: Kind, config: Config) -> str:
    """Return a hash of all that the numbers follow from besides network and seed."""
    values = config_to_values(config.eval)
    facts = {
        "kind": kind.name,
        "options": {name: values[name] for name in kind.options},
        "image_size_px": config.eval.image_size_px or config.augment.image_size_px,
        "sets": {option: _contents(uri) for option, uri in kind.sets(config).items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def store_scores(part: str, scores: Scores) -> None:
    """Write scores, pictures included, as one file: it is whole or not there."""
    pictures = {name: base64.b64encode(png).decode() for name, png in scores.pictures.items()}
    text = json.dumps({**asdict(scores), "pictures": pictures})
    storage.write_text(storage.join(part, "scores.json"), text)


def stored_scores(part: str) -> Scores | None:
    """Return what an earlier call has stored; None: nothing whole is there."""
    uri = storage.join(part, "scores.json")
    if not storage.exists(uri):
        return None
    try:
        found = json.loads(storage.read_text(uri))
        return Scores(
            values=found["values"],
            intervals={name: (low, high) for name, (low, high) in found["intervals"].items()},
            classes=found["classes"],
            pictures={k: base64.b64decode(png) for k, png in found["pictures"].items()},
            about=found["about"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, storage.NotTextError):
        return None  # damaged: it is judged again


def _tasks(
    kind: Kind, rows: Sequence[Row], config: Config
) -> Iterator[tuple[Row, JudgedNetwork, int]]:
    seeds = range(config.run.seed, config.run.seed + (config.eval.seeds if kind.draws else 1))
    for row in rows:
        for network in row.networks:
            for seed in seeds:
                yield row, network, seed


def _contents(uri: str) -> str:
    """Return a hash of names and sizes: sets that have changed are judged anew."""
    place = storage.absolute(uri)
    if not storage.is_folder(place):
        return hashlib.sha256(storage.read_bytes(place)).hexdigest()
    files = sorted((file.uri, file.size_bytes) for file in storage.list_files(place))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _headline(scores: Scores) -> str:
    name, value = next(iter(scores.values.items()))
    return f"{name} {value:.1f}, {scores.about.get('seconds', 0):.0f} s"
