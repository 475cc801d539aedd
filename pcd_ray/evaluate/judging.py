"""Judge rows of networks part by part: what is done is stored, and read the next time.

    PARTS/NETWORK/                        what serves all kinds and seeds: features
    PARTS/NETWORK/KIND-PROTOCOL/seed_N/   scores.json, and what else is kept of a measurement
    PARTS/NETWORK/KIND-PROTOCOL/seed_N/work/   deleted once the scores are stored

``NETWORK`` is a hash of weights and normalisation, ``PROTOCOL`` one of all that numbers follow from
besides network and seed (`protocol_of`): nothing that has changed is read.
"""

import base64
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from PIL import Image

from pcd_ray import storage
from pcd_ray.config import Config
from pcd_ray.errors import PcdError
from pcd_ray.evaluate.contents import hash_of
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import Row

_HASH = 16  # characters of a hash that name a folder


@dataclass(frozen=True, slots=True)
class Place:
    """Where a judge may keep what it makes."""

    shared: str
    """Folder of a network, for all kinds and seeds."""
    part: str
    """Folder of one measurement."""

    @property
    def work(self) -> str:
        """Folder for what an interrupted judgement goes on from, in that of the measurement."""
        return storage.join(self.part, "work")


class Judge(Protocol):
    """Judges one network with one seed."""

    def __call__(
        self,
        network: JudgedNetwork,
        data: Any,
        config: Config,
        *,
        place: Place,
        seed: int,
        device: str,
    ) -> Scores:
        """Return its scores; ``data`` is what `Kind.open` gave."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to judge a network."""

    name: str
    title: Callable[[Config], str]
    format: int
    """Rises when the same options give other numbers than before."""
    sets: Callable[[Config], Mapping[str, str]]
    """The labelled sets that it needs: option -> URI."""
    open: Callable[[Config], Any]
    """Opens and checks those sets, once, and the options: refuses what cannot be used before
    anything is judged."""
    notes: Callable[[Any, Config], Sequence[str]]
    """What is worth knowing of the opened sets."""
    facts: Callable[[Any, Config, str], Mapping[str, Any]]
    """Opened sets, options, device -> all that numbers follow from besides network and seed, with
    presets and defaults resolved, by a name for readers."""
    contents: Callable[[Any], object]
    """Plain data that differs where the opened sets do."""
    judge: Judge
    images: Callable[[Any, Config], list[Image.Image]]
    """A few images of the opened sets, for pictures."""
    method: Callable[[Config], str] = lambda _: ""
    """Which of several methods is asked for."""
    fine_tunes: Callable[[Config], bool] = lambda _: False
    """Whether the network itself is trained."""
    draws: bool = True
    """Whether another seed gives another number."""


Measurements = dict[str, list[list[Scores]]]
"""Row -> network -> seed -> scores; a network or seed that could not be judged has none."""


def judge_rows(  # noqa: PLR0913 - whom, on what, how, where
    kind: Kind,
    rows: Sequence[Row],
    data: Any,
    config: Config,
    *,
    protocol: str,
    parts: str,
    device: str,
) -> tuple[Measurements, dict[str, str]]:
    """Judge all networks with all seeds; one that fails costs itself alone, whatever the cause.

    Args:
        kind: how.
        rows: what.
        data: from ``kind.open``.
        config: the options.
        protocol: from `protocol_of`.
        parts: folder of what is stored.
        device: ``cpu`` or ``cuda``.

    Returns:
        The measurements, and what could not be judged -> why.
    """
    measured: Measurements = {row.label: [[] for _ in row.networks] for row in rows}
    failures: dict[str, str] = {}
    said: set[str] = set()
    for row, number, seed in _tasks(kind, rows, config):
        network = row.networks[number]
        shared = storage.join(parts, network.identity[:_HASH])
        part = storage.join(shared, f"{kind.name}-{protocol[:_HASH]}", f"seed_{seed}")
        name = f"{row.label} ({network.source}), seed {seed}"
        try:
            scores = stored_scores(part)
            if scores is None:
                _say(f"{kind.title(config)}: {name}")
                scores = _judged(kind, network, data, config, Place(shared, part), seed, device)
        except Exception as error:
            failures[name] = story_of(error)
            continue
        measured[row.label][number].append(scores)
        _say(f"  {row.label}, seed {seed}: {_headline(scores)}")
        new = {f"{row.label}: {note}" for note in scores.about.get("notes", [])} - said
        said |= new
        for note in sorted(new):
            _say(f"note: {note}")
    return measured, failures


def _judged(  # noqa: PLR0913 - as Judge
    kind: Kind,
    network: JudgedNetwork,
    data: Any,
    config: Config,
    place: Place,
    seed: int,
    device: str,
) -> Scores:
    """Judge a network, store its scores, and clear away what they were made from."""
    started = time.monotonic()
    scores = kind.judge(network, data, config, place=place, seed=seed, device=device)
    scores.about["seconds"] = round(time.monotonic() - started, 1)
    scores.about["device"] = device
    store_scores(place.part, scores)
    storage.delete_folder(place.work)
    return scores


def story_of(error: Exception) -> str:
    """Return an error in one line; one that is not ours leaves its traceback on stderr."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, PcdError):
        return " ".join(lines)
    traceback.print_exception(error, file=sys.stderr)
    return ": ".join([type(error).__name__, *lines[-1:]])


def protocol_of(kind: Kind, data: Any, config: Config, device: str) -> str:
    """Return a hash of all that the numbers follow from besides network and seed."""
    return hash_of(
        {
            "kind": kind.name,
            "format": kind.format,
            "facts": kind.facts(data, config, device),
            "contents": kind.contents(data),
        }
    )


def store_scores(part: str, scores: Scores) -> None:
    """Write scores, pictures included, as one file: it is whole or not there."""
    pictures = {name: base64.b64encode(png).decode() for name, png in scores.pictures.items()}
    text = json.dumps({**asdict(scores), "pictures": pictures})
    storage.write_text(storage.join(part, "scores.json"), text)


def stored_scores(part: str) -> Scores | None:
    """Return what an earlier call has stored; None: nothing whole and finite is there."""
    uri = storage.join(part, "scores.json")
    if not storage.exists(uri):
        return None
    try:
        found = json.loads(storage.read_text(uri), parse_constant=_refused)
        return Scores(
            values=found["values"],
            intervals={name: (low, high) for name, (low, high) in found["intervals"].items()},
            test_images=found["test_images"],
            classes=found["classes"],
            pictures={k: base64.b64decode(png) for k, png in found["pictures"].items()},
            about=found["about"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, storage.NotTextError):
        return None  # damaged: it is judged again


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON; no score is NaN or infinite")


def _tasks(kind: Kind, rows: Sequence[Row], config: Config) -> Iterator[tuple[Row, int, int]]:
    seeds = range(config.run.seed, config.run.seed + (config.eval.seeds if kind.draws else 1))
    for row in rows:
        for number in range(len(row.networks)):
            for seed in seeds:
                yield row, number, seed


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _headline(scores: Scores) -> str:
    name, value = next(iter(scores.values.items()))
    return f"{name} {value:.1f}, {scores.about.get('seconds', 0):.0f} s"
