"""The search space: a trial is a configuration in which some options have other values.

Names are options' dotted paths, so that the best trial is a YAML file. Everything that can be known
to be wrong is refused before a trial starts: each value that a range ends at or a list holds is
tried alone, and combinations are drawn at random.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from pcd_ray import storage
from pcd_ray.config import Config, nearest_option, option_names, option_value, with_values
from pcd_ray.errors import ConfigError
from pcd_ray.tune.space_function import SpaceFunction, load_function, source_of, values_of

Values = dict[str, Any]
"""Options' dotted names -> their values in a trial."""

_RULES = ("uniform", "log", "choice")
_DRAWS = 64  # combinations tried before a sweep starts
_SETTLED = {
    "run": "says where the sweep lives",
    "tune": "is the search itself",
    "data": "is the same for all trials",
    "eval": "says how trials are judged, which must be the same for all",
    "export": "is no part of training",
    "scale": "is no part of training",
    **{
        f"train.{name}": "is what a trial costs the cluster, the same for all"
        for name in ("num_workers", "device", "cpus_per_worker", "threads_per_worker")
    },
}
_WEIGHTS = ("teacher.weights", "teacher_2.weights")
_PLACES = (*_WEIGHTS, "teacher.cache.path", "teacher_2.cache.path")
_EPOCHS = "train.epochs"
_FORM = "write {log: [low, high]}, {uniform: [low, high]} or {choice: [a, b]}"


@dataclass(frozen=True, slots=True)
class Space:
    """A search space that has been checked against the configuration that it varies."""

    distributions: Mapping[str, BaseDistribution]
    """Option -> where its values come from; of a function what it was seen to ask for."""
    function: SpaceFunction | None
    """Asks for the values itself; None: all ``distributions`` are asked for."""
    sha256: str
    """By which a changed space is noticed."""
    weights: tuple[str, ...] = ()
    """Teachers' files that trials choose from, or were seen to have."""
    most_epochs: int = 0
    """Of the trial that trains for longest, as far as is known."""

    def own_values(self, config: Config) -> Values:
        """Return the values that a configuration has, of the options that could take them."""
        own = {name: option_value(config, name) for name in self.distributions}
        for name in set(own) & set(_PLACES):  # a function may ask for relative ones
            choices = getattr(self.distributions[name], "choices", ())
            own[name] = next((c for c in choices if _absolute(c) == own[name]), own[name])
        return {n: v for n, v in own.items() if _holds(self.distributions[n], v)}

    def example(self) -> dict[str, str]:
        """Return each option's range in words."""
        return {name: in_words(each) for name, each in self.distributions.items()}


def open_space(config: Config) -> Space:
    """Return the space of ``tune.space`` or ``tune.space_function``, checked.

    Raises:
        ConfigError: all that is wrong with it: it is empty, an option is unknown or settled, a
            range is contradictory, a value is refused by the option itself, weights do not exist,
            or all of the combinations that were drawn are refused.
        StorageError: the storage of weights cannot be asked.
    """
    if config.tune.space_function:
        function = load_function(config.tune.space_function)
        distributions, added = _asked_for(function)
        # its text alone would not tell of a changed constant, or of another function that it calls
        story = [source_of(function), _stories(distributions), added]
        space = Space(distributions, function, _sha256(story))
        _check_names(space.distributions, config)
    else:
        distributions = _distributions(config)
        space = Space(distributions, None, _sha256(_stories(distributions)))
    seen = _check_combinations(space, config)
    weights = _check_weights(space, seen)
    return replace(space, weights=weights, most_epochs=_most_epochs(space, seen, config))


def with_absolute_choices(config: Config) -> Config:
    """Return the configuration with choices of paths that mean the same in a trial's own folder."""
    given = dict(flat_space(config.tune.space))
    changed = {n: _absolute_rule(rule) if n in _PLACES else rule for n, rule in given.items()}
    if changed == given:
        return config
    return replace(config, tune=replace(config.tune, space=changed))


def with_absolute_paths(values: Mapping[str, Any]) -> Values:
    """Return a trial's values with paths that mean the same in its own folder."""
    return {n: _absolute(value) if n in _PLACES else value for n, value in values.items()}


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the configuration of a trial.

    Raises:
        ConfigError: the values do not go together.
    """
    return with_values(config, values)


def epochs_of(values: Mapping[str, Any], config: Config) -> int:
    """Return how many epochs a trial with these values trains for."""
    epochs = values.get(_EPOCHS)
    return epochs if isinstance(epochs, int) else config.train.epochs  # else it is refused


def in_words(distribution: BaseDistribution) -> str:
    """Return a range as a reader knows it, e.g. ``0.03 .. 0.5 (log)``."""
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(map(str, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return f"{distribution.low:g} .. {distribution.high:g}" + " (log)" * distribution.log


def _distributions(config: Config) -> dict[str, BaseDistribution]:
    given = dict(flat_space(config.tune.space))
    if not given:
        raise ConfigError(
            "tune.space is empty; say what to vary, e.g. tune.space: {loss.temperature: "
            "{log: [0.03, 0.5]}}, or give tune.space_function"
        )
    _check_names(given, config)
    problems, found = [], {}
    for name, rule in given.items():
        try:
            found[name] = _distribution(name, rule, option_value(config, name))
            _check_values(name, found[name], config)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def flat_space(space: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (option, rule) pairs; options may be written as paths or as nested sections."""
    pairs = []
    for name, rule in space.items():
        nested = isinstance(rule, Mapping) and rule and not set(rule) & {*_RULES, "step"}
        pairs += flat_space(rule, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", rule)]
    return pairs


def _check_names(given: Mapping[str, Any], config: Config) -> None:
    known, problems = set(option_names()), []
    for name in given:
        section = name.partition(".")[0]
        reason = _SETTLED.get(name) or _SETTLED.get(section)
        if name not in known:
            problems.append(f"tune.space: {name}: unknown option{nearest_option(name)}")
        elif reason:
            problems.append(f"tune.space: {name} {reason}; leave it out")
        elif section == "teacher_2" and config.teacher_2 is None:
            problems.append(f"tune.space: {name}: there is no second teacher; give teacher_2")
    if problems:
        raise ConfigError("\n".join(problems))


def _distribution(name: str, rule: Any, own: Any) -> BaseDistribution:
    """Turn ``{log: [0.03, 0.5]}`` and the like into Optuna's words."""
    kinds = [kind for kind in _RULES if isinstance(rule, Mapping) and kind in rule]
    if len(kinds) != 1 or set(rule) - {*kinds, "step"}:
        raise ConfigError(f"tune.space: {name}: got {rule!r}; {_FORM}")
    kind = kinds[0]
    if type(own) is int:  # 1e3 is a whole number for the option itself, too
        rule = {key: _whole(value) for key, value in rule.items()}
    if kind == "choice":
        return _choice(name, rule)
    ends = _ends(name, kind, rule[kind])
    if isinstance(own, bool) or not isinstance(own, int | float):
        raise ConfigError(f"tune.space: {name}={own!r} is no number; write {{choice: [a, b]}}")
    step = rule.get("step")
    whole = isinstance(own, int)
    if step is not None and (kind == "log" or not _is_number(step, whole) or step <= 0):
        raise ConfigError(
            f"tune.space: {name}: step={step!r}; give a {'whole ' * whole}number > 0 with uniform"
        )
    if whole and not all(_is_number(end, whole=True) for end in ends):
        raise ConfigError(f"tune.space: {name}: {kind}={list(ends)}; it takes whole numbers")
    if whole:
        return IntDistribution(int(ends[0]), int(ends[1]), log=kind == "log", step=step or 1)
    return FloatDistribution(float(ends[0]), float(ends[1]), log=kind == "log", step=step)


def _whole(value: Any) -> Any:
    """Return a number, or each of a list, as an int where it is whole."""
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ends(name: str, kind: str, given: Any) -> tuple[float, float]:
    right = isinstance(given, Sequence) and len(given) == 2 and all(map(_is_number, given))
    if not right or not given[0] < given[1] or (kind == "log" and given[0] <= 0):
        wanted = "0 < low < high" if kind == "log" else "low < high"
        raise ConfigError(f"tune.space: {name}: {kind}={given!r}; give two finite ends, {wanted}")
    return given[0], given[1]


def _choice(name: str, rule: Mapping[str, Any]) -> CategoricalDistribution:
    values = rule["choice"]
    plain = isinstance(values, list | tuple) and all(
        value is None or isinstance(value, bool | int | float | str) for value in values
    )
    if "step" in rule or not plain or len({repr(value) for value in values}) < 2:
        raise ConfigError(
            f"tune.space: {name}: choice={values!r}; give a list of two or more numbers or words"
        )
    if len({repr(value) for value in values}) < len(values):
        raise ConfigError(f"tune.space: {name}: choice={values!r} names a value twice")
    return CategoricalDistribution(values)


def _is_number(value: Any, whole: bool = False) -> bool:
    kinds = int if whole else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _check_values(name: str, distribution: BaseDistribution, config: Config) -> None:
    """Try each choice, or both ends, in the configuration as it is otherwise."""
    if isinstance(distribution, CategoricalDistribution):
        values: Sequence[Any] = distribution.choices
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        values = (distribution.low, distribution.high)
    for value in values:
        try:
            with_values(config, {name: value})
        except ConfigError as error:
            raise ConfigError(f"tune.space: {name}: {error}") from error


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    """Say whether a trial could be given this value."""
    if isinstance(distribution, CategoricalDistribution):
        return any(value == c and type(value) is type(c) for c in distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if not _is_number(value) or not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return bool(abs(steps - round(steps)) < 1e-9)


def _check_combinations(space: Space, config: Config) -> list[Values]:
    """Refuse a space none of whose combinations is a configuration; return those that are."""
    refused: list[str] = []
    right: list[Values] = []
    study = _throwaway_study()
    for _ in range(_DRAWS):
        try:
            values = drawn(space, study.ask())
            trial_config(config, values)
            right.append(values)
        except ConfigError as error:
            refused.append(str(error))
    if len(refused) == _DRAWS:
        raise ConfigError(
            f"tune.space is contradictory: none of {_DRAWS} combinations of it is a configuration; "
            f"the first one's trouble: {refused[0]}"
        )
    return right


def _check_weights(space: Space, seen: Iterable[Values]) -> tuple[str, ...]:
    """Return the weights that trials choose from or were seen to have; refuse absent ones."""
    there: dict[str, None] = {}
    for name in _WEIGHTS:
        choices = getattr(space.distributions.get(name), "choices", ())
        asked = [_absolute(choice) for choice in choices if isinstance(choice, str)]
        given = dict.fromkeys([*asked, *(each[name] for each in seen if name in each)])
        if absent := [uri for uri in given if uri and not storage.exists(uri)]:
            raise ConfigError(
                f"tune.space: {name}: there is no {', '.join(absent)}; give weights files that "
                "exist, relative to the folder that the command is given in"
            )
        there |= {uri: None for uri in given if uri}
    return tuple(there)


def _most_epochs(space: Space, seen: Iterable[Values], config: Config) -> int:
    """Return the most epochs that a trial may have or was seen to have."""
    asked = space.distributions.get(_EPOCHS)
    choices = asked.choices if isinstance(asked, CategoricalDistribution) else ()
    ends = [asked.high] if isinstance(asked, IntDistribution) else choices
    chosen = [epochs_of(values, config) for values in seen]  # a function may set it, not ask
    return max([*chosen, *(value for value in ends if isinstance(value, int))])


def _absolute(value: Any) -> Any:
    return storage.absolute(value) if isinstance(value, str) and value else value


def _absolute_rule(rule: Any) -> Any:
    choices = rule.get("choice") if isinstance(rule, Mapping) else None
    if not isinstance(choices, list | tuple):
        return rule  # refused later
    return {**rule, "choice": [_absolute(value) for value in choices]}


def drawn(space: Space, trial: optuna.trial.Trial) -> Values:
    """Return the values of a trial, as the study's sampler chooses them.

    Raises:
        ConfigError: the space function fails, or what it returns is no mapping of options.
    """
    if space.function is None:
        return {name: _suggested(trial, name, d) for name, d in space.distributions.items()}
    return with_absolute_paths(values_of(space.function, trial))


def _suggested(trial: optuna.trial.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def _throwaway_study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def _asked_for(function: SpaceFunction) -> tuple[dict[str, BaseDistribution], list[Values]]:
    """Return what a function asks for in some trials, conditions included, and what it sets."""
    study = _throwaway_study()
    found: dict[str, BaseDistribution] = {}
    set_by_it = []
    for _ in range(_DRAWS):
        trial = study.ask()
        values = values_of(function, trial)
        added = {n: v for n, v in values.items() if n not in trial.params or trial.params[n] != v}
        set_by_it.append(added)
        found |= {n: _higher(found.get(n), each) for n, each in trial.distributions.items()}
        found |= {name: CategoricalDistribution((None,)) for name in set(added) - set(found)}
    if not found:
        raise ConfigError(
            "tune.space_function asks its trial for nothing; call trial.suggest_float and the like"
        )
    return found, set_by_it


def _higher(one: BaseDistribution | None, other: BaseDistribution) -> BaseDistribution:
    """Return that of two conditional ranges which reaches higher."""
    ends = [getattr(each, "high", -math.inf) for each in (one, other)]
    return one if one is not None and ends[0] > ends[1] else other


def _stories(distributions: Mapping[str, BaseDistribution]) -> dict[str, str]:
    return {name: distribution_to_json(each) for name, each in distributions.items()}


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
