"""Find the state dict in a checkpoint, and strip what training code puts before its keys."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor

from pcd_ray.distill.releases import CLASSIFIER, layout_of
from pcd_ray.errors import WeightsError

_LISTED_KEYS = 6  # of a long list of keys, the first few say enough
_PUBLISHED_ENTRIES = ("state_dict", "teacher", "model")
"""Entries that hold the weights of published checkpoints, in this order."""
_MAX_NESTING = 4
_COMPILED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before names, at any depth."""
_PARALLEL = re.compile(r"^(\w+\.)??(module\.)+")  # DistributedDataParallel's, of a submodule too
_COUNTERS = ("n_averaged", "total_ops", "total_params")
"""What torch's averaged models and counters of operations add: no part of any network."""
_OWN_ROOTS = ("features", "body", "blocks", "stages", "layers")
"""Modules that hold all weights of some networks: no prefix of a tool."""
_NETWORKS = ("model", "net", "network", "backbone", "encoder", "student", "teacher")
"""Attributes under which training code keeps networks."""
_DECODER = "a decoder, not part of the backbone"
_LOSS = "part of its training loss"
_BESIDE = {
    "head": CLASSIFIER,
    "classifier": CLASSIFIER,
    "cls_classifier": CLASSIFIER,
    "distillation_classifier": CLASSIFIER,
    "fc": CLASSIFIER,
    "decoder": _DECODER,
    "decode_head": _DECODER,
    "aux_classifier": _DECODER,
    "segmentation_head": _DECODER,
    "criterion": _LOSS,
    "loss": _LOSS,
    "loss_fn": _LOSS,
}
"""What may stand beside such a network, and why it is left out."""

_State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class StateDict:
    """The state dict of a checkpoint."""

    tensors: dict[str, Tensor]
    entry: str = ""
    """The entries that lead to it, joined by dots; empty: the checkpoint itself."""
    beside: tuple[str, ...] = ()
    """Names of what the file holds besides."""


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A state dict without the prefixes of tools."""

    tensors: dict[str, Tensor]
    prefix: str = ""
    """What stood before the network's keys and was removed."""
    removed: tuple[str, ...] = ()
    """Everything that was removed from keys, as users should read it."""
    parallel: bool = False
    """Whether DistributedDataParallel's prefix was among it."""
    root: str = ""
    """The last prefix that was removed because all keys had it."""
    unused: dict[str, str] = field(default_factory=dict)
    """Prefixes of keys beside the network, and why they are left out."""


def listed(names: Sequence[str]) -> str:
    """Return names in a row, a long list cut."""
    more = f", ... ({len(names) - _LISTED_KEYS} more)" if len(names) > _LISTED_KEYS else ""
    return ", ".join(names[:_LISTED_KEYS]) + more


def open_checkpoint(content: object, *, uri: str) -> StateDict:
    """Return the only state dict in a checkpoint, however deep it lies.

    A state dict is a mapping with tensors under dotted names. Optimizers are passed over; where
    there are several state dicts, a published layout decides.

    Raises:
        WeightsError: there is none, or there are several.
    """
    found = dict(_state_dicts(content))
    if not found:
        raise WeightsError(
            f"{uri} holds {_what_instead(content)}; give the file that holds the state dict"
        )
    path = next(iter(found)) if len(found) == 1 else _published(found, uri=uri)
    inner = found[path]
    tensors = {str(key): value for key, value in inner.items() if _is_weight(value, key)}
    beside = [str(key) for key in inner if str(key) not in tensors]
    outer: Any = content
    for name in path:
        if isinstance(outer, Mapping):
            beside += [str(other) for other in outer if other != name]
        outer = outer[name]
    return StateDict(tensors, ".".join(map(str, path)), tuple(beside))


def _is_weight(value: object, key: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and str(key).rpartition(".")[2] not in _COUNTERS


def _state_dicts(
    content: object, path: tuple[object, ...] = ()
) -> Iterator[tuple[tuple[object, ...], Mapping[object, object]]]:
    """Yield every state dict in a checkpoint, by the entries that lead to it."""
    if isinstance(content, Mapping):
        if any("." in str(k) and isinstance(v, Tensor) for k, v in content.items()):
            yield path, content
            return
        inner = [(name, each) for name, each in content.items() if not _is_optimizer(name)]
    elif isinstance(content, list | tuple):
        inner = list(enumerate(content))
    else:
        return
    if len(path) < _MAX_NESTING:
        for name, each in inner:
            yield from _state_dicts(each, (*path, name))


def _is_optimizer(name: object) -> bool:
    return str(name).startswith("optim")


def _published(
    found: Mapping[tuple[object, ...], Mapping[object, object]], *, uri: str
) -> tuple[object, ...]:
    """Return the path of the state dict that a published layout uses, of several.

    Raises:
        WeightsError: no published layout decides; all are listed.
    """
    for entry in _PUBLISHED_ENTRIES:
        keys = [
            _PARALLEL.sub(r"\1", _COMPILED.sub("", str(key))) for key in found.get((entry,), ())
        ]
        layout = layout_of(keys, parallel=False)
        if layout is not None and layout.head:
            return (entry,)
    each = [f"{'.'.join(map(str, path))} ({len(inner)} entries)" for path, inner in found.items()]
    first = "".join(f"[{name!r}]" for name in next(iter(found)))
    raise WeightsError(
        f"{uri} holds {len(found)} state dicts: {listed(each)}; save the one to use in a file of "
        f"its own: torch.save(torch.load({uri!r}, map_location='cpu'){first}, 'weights.pth')"
    )


def _what_instead(content: object) -> str:
    inner = content
    if isinstance(content, Mapping):
        entries = (content[name] for name in _PUBLISHED_ENTRIES if name in content)
        inner = next((each for each in entries if isinstance(each, Mapping)), content)
    if not isinstance(inner, Mapping) or not inner:
        return f"a {type(content).__name__}, not a state dict of tensors"
    strange = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
    if not strange:
        return f"tensors under names of no network ({listed([*map(str, inner)])})"
    return (
        f"entries that are not torch tensors: {listed(strange)} (convert NumPy arrays by "
        "torch.from_numpy)"
    )


def unwrapped(tensors: _State, *, known: Callable[[_State], bool], uri: str) -> Unwrapped:
    """Strip prefixes that tools and training code put before keys, in any order and nesting.

    Published layouts come first: their prefixes have a meaning.

    Args:
        tensors: the state dict.
        known: whether a state dict is, as it stands, that of a known network.
        uri: its file, for messages.

    Raises:
        WeightsError: keys occur with and without a prefix, or of several networks.
    """
    origin = _without_wrappers({key: key for key in tensors}, uri=uri)
    parallel = any(_COMPILED.sub("", key).startswith("module.") for key in tensors)
    roots, left = [], []
    while True:
        state = {key: tensors[original] for key, original in origin.items()}
        if layout_of(state, parallel=parallel) is not None or known(state):
            break
        root = _root_of(state, known=known, uri=uri)
        if root is None:
            break
        left += [original for key, original in origin.items() if _first(key) != root]
        inner = {k.removeprefix(f"{root}."): o for k, o in origin.items() if _first(k) == root}
        origin = _without_wrappers(inner, uri=uri)
        roots.append(f"{root}.")
    removed = {part for key, original in origin.items() for part in _removed(original, key)}
    return Unwrapped(
        state,
        prefix=max((o.removesuffix(k) for k, o in origin.items() if o.endswith(k)), key=len),
        removed=tuple(sorted(removed)),
        parallel=parallel,
        root=roots[-1] if roots else "",
        unused=_reasons(left),
    )


def _removed(original: str, key: str) -> list[str]:
    """Return the parts of a key that are gone, those that followed one another in one piece."""
    kept, pieces = key.split("."), [""]
    for part in reversed(original.split(".")):
        if kept and part == kept[-1]:
            kept.pop()
            pieces.append("")
        else:
            pieces[-1] = f"{part}.{pieces[-1]}"
    return [piece for piece in reversed(pieces) if piece]


def _without_wrappers(origin: Mapping[str, str], *, uri: str) -> dict[str, str]:
    """Return keys without what tools put before them; the values, the original keys, stay."""
    plain: dict[str, str] = {}
    twice: dict[str, str] = {}
    for key, original in origin.items():
        new = _PARALLEL.sub(lambda match: match[1] or "", _COMPILED.sub("", key))
        if new in plain:
            longer = max(key, plain[new], key=len)
            twice[new] = longer.removesuffix(new)
        plain[new] = original
    if twice:
        raise WeightsError(
            f"{uri} holds {len(twice)} keys with and without {', '.join({*twice.values()})}: "
            f"{listed([*twice])}; give the file as published"
        )
    return plain


def _root_of(state: _State, *, known: Callable[[_State], bool], uri: str) -> str | None:
    """Return the module that holds the network; None: keys have no prefix of that kind.

    Raises:
        WeightsError: several modules hold one, or keys stand beside it that nothing explains.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        groups.setdefault(_first(key), {})[key.partition(".")[2]] = value
    roots = [name for name in groups if name not in _BESIDE]
    networks = [name for name in roots if name in _NETWORKS or known(groups[name])]
    if len(roots) == 1:
        alone = len(groups) == 1 and roots[0] not in _OWN_ROOTS and "" not in groups[roots[0]]
        return roots[0] if alone or networks else None
    if len(networks) > 1:
        each = [f"{name}.* ({len(groups[name])} tensors)" for name in networks]
        raise WeightsError(
            f"{uri} holds {len(networks)} networks: {listed(each)}; save the state dict of the one "
            f"to use in a file of its own"
        )
    if any(known(groups[name]) for name in networks):
        strange = [key for key in state if _first(key) not in (*networks, *_BESIDE)]
        raise WeightsError(
            f"{uri} holds a network under {networks[0]}.* and {len(strange)} keys beside it: "
            f"{listed(strange)}; save the state dict of the network in a file of its own"
        )
    return None


def _first(key: str) -> str:
    return key.partition(".")[0]


def _reasons(keys: Sequence[str]) -> dict[str, str]:
    """Return why keys beside a network are left out, by the prefix that ends in that name."""
    found = {}
    for key in keys:
        parts = key.split(".")
        number = next(i for i, part in enumerate(parts) if part in _BESIDE)
        found[".".join(parts[: number + 1]) + "."] = _BESIDE[parts[number]]
    return found
