"""Who chooses the next trial, and who stops one: OptunaSearch and Tune's schedulers, resumable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from pcd_ray import storage
from pcd_ray.config import Config, TuneConfig
from pcd_ray.errors import ConfigError
from pcd_ray.tune.records import trial_name
from pcd_ray.tune.space import Space, drawn
from pcd_ray.tune.study import (
    ADDED,
    COST,
    HISTORY,
    OVER,
    REASON,
    OpenStudy,
    history_of,
    new_storage,
    sampler,
)

SCORE = "score"
"""Of a trial's report: ``tune.metric``, in percent."""
EPOCH = "epoch"
"""Of a trial's report: epochs done."""
FINISHED = "finished"
"""Of a trial's last report: it has trained for all of its epochs and was judged."""
RESERVATION = "reservation"
"""Of a trial's report: what its workers hold, for `free_reservation`."""
NUMBER = "number"
"""Of a trial's parameters: its number in the study."""
VALUES = "values"
"""Of a trial's parameters: options' names -> values."""
REFUSAL = "refusal"
"""Of a trial's parameters: why it cannot be; empty: it can."""
_UNSAID = "its process died without a word; it may have run out of memory"


class StudySearch(OptunaSearch):
    """OptunaSearch on a study that outlives its driver.

    Four things differ. Trials that a killed driver left running are handed out first, so that they
    go on from their checkpoints. A trial whose values a space function does not tell is handed out
    to fail. Trials that a scheduler stopped are told to Optuna as pruned, not as complete with the
    score they had so far. Failed ones keep their reason.
    """

    def __init__(self, opened: OpenStudy, space: Space, config: Config, trials_uri: str) -> None:
        costs = config.tune.cost != "none"
        super().__init__(
            space=space.function or dict(space.distributions),  # type: ignore[arg-type]
            metric=[SCORE, COST] if costs else SCORE,
            mode=["max", "min"] if costs else "max",
            sampler=sampler(config, trials=len(opened.study.get_trials(deepcopy=False))),
            study_name=opened.study.study_name,
            storage=new_storage(opened.url),
        )
        self._searched = space
        self._interrupted = [trial.number for trial in opened.trials(TrialState.RUNNING)]
        self._trials_uri = trials_uri
        self._several = costs

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next trial's number and values."""
        if trial_id not in self._ot_trials:
            self._ot_trials[trial_id] = self._interrupted_trial() or self._study.ask()
        trial, refusal = self._ot_trials[trial_id], ""
        try:
            values = drawn(self._searched, trial)  # what an interrupted one was given stays
        except ConfigError as error:  # of a space function: the next trial may be spared it
            values, refusal = trial.params, str(error)
        asked = trial.params
        added = {n: v for n, v in values.items() if n not in asked or asked[n] != v}
        trial.set_user_attr(ADDED, added)
        return {NUMBER: trial.number, VALUES: values, REFUSAL: refusal}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note a score by its epoch."""
        trial = self._ot_trials[trial_id]
        history = dict(trial.user_attrs.get(HISTORY, []))
        known = result[EPOCH] in history
        history[result[EPOCH]] = result[SCORE]
        trial.set_user_attr(HISTORY, sorted(history.items()))
        if not self._several and not known:
            trial.report(result[SCORE], result[EPOCH])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how a trial ended; one that the driver abandons stays running."""
        trial = self._ot_trials[trial_id]
        if result and not error:
            self.on_trial_result(trial_id, result)  # the last one is told here alone
        if error:
            trial.set_user_attr(REASON, self._reason(trial.number))
            self._study.tell(trial, state=TrialState.FAIL)
        elif result and result.get(FINISHED):
            trial.set_user_attr(COST, result[COST])
            values = [result[SCORE], result[COST]] if self._several else [result[SCORE]]
            self._study.tell(trial, values)
        elif result:
            self._study.tell(trial, state=TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a sweep goes on from its study, whose URL may hold a password."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the study out, of the copy of the search that Tune writes to disk."""
        return {}

    def _interrupted_trial(self) -> optuna.trial.Trial | None:
        if not self._interrupted:
            return None
        stored = self._study.get_trials(deepcopy=False)[self._interrupted.pop(0)]
        return optuna.trial.Trial(self._study, stored._trial_id)

    @property
    def _study(self) -> optuna.Study:
        study = self._ot_study
        assert isinstance(study, optuna.Study)
        return study

    def _reason(self, number: int) -> str:
        uri = reason_file(self._trials_uri, number)
        if storage.exists(uri):
            return storage.read_text(uri)
        command = train_command(self._trials_uri, number)
        return f"{_UNSAID}; {command} goes on with it, the sweep does not"


def reason_file(trials_uri: str, number: int) -> str:
    """Return the URI of the file in which a failing trial says why."""
    return storage.join(trials_uri, trial_name(number), "failure.txt")


class _Remembering(TrialScheduler):
    """Part of a scheduler that knows the scores which trials had in earlier sittings."""

    _earlier: Mapping[int, Mapping[int, float]] = {}

    def remember(self, earlier: Mapping[int, Mapping[int, float]]) -> None:
        """Take number -> epoch -> score of trials that may be added."""
        self._earlier = earlier

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial with the scores that it had; what is decided on them is over."""
        super().on_trial_add(tune_controller, trial)
        for epoch, score in sorted(self._earlier.get(trial.config[NUMBER], {}).items()):
            self._replay(tune_controller, trial, {EPOCH: epoch, SCORE: score})

    def _replay(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.on_trial_result(tune_controller, trial, result)


class _Asha(_Remembering, ASHAScheduler):
    pass


class _Median(_Remembering, MedianStoppingRule):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide as Tune does; an epoch that is done again after a resume counts once."""
        kept = [each for each in self._results[trial] if each[EPOCH] != result[EPOCH]]
        self._results[trial] = kept
        return str(super().on_trial_result(tune_controller, trial, result))

    def _replay(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super()._replay(tune_controller, trial, result)
        self._stopped_trials.discard(trial)  # it takes no further score of one that it would stop


def train_command(trials_uri: str, number: int) -> str:
    """Return what goes on with a trial that failed, as a run of its own."""
    return f"`pcd-ray train {storage.join(trials_uri, trial_name(number), 'config.yaml')}`"


def stopping_rule(config: Config, space: Space, opened: OpenStudy) -> TrialScheduler:
    """Return what stops trials early; it has seen all scores of earlier sittings.

    Those of trials that are over at once, those of an interrupted one when that goes on.
    """
    rule = _new_rule(config.tune, most_epochs=space.most_epochs)
    if not isinstance(rule, _Remembering):
        return rule
    begun = opened.trials(*OVER, TrialState.RUNNING)
    rule.remember({trial.number: history_of(trial) for trial in begun})
    for trial in begun:
        if trial.state in OVER:
            rule.on_trial_add(None, _Past(f"past_{trial.number}", {NUMBER: trial.number}))
    return rule


@dataclass(eq=False, slots=True)
class _Past:
    """A trial of an earlier sitting, as far as a scheduler needs to know it."""

    trial_id: str
    config: dict[str, Any]


def _new_rule(options: TuneConfig, *, most_epochs: int) -> TrialScheduler:
    if options.scheduler == "asha":
        return _Asha(
            time_attr=EPOCH,
            metric=SCORE,
            mode="max",
            max_t=max(most_epochs, options.grace_epochs),
            grace_period=options.grace_epochs,
            reduction_factor=options.reduction_factor,
            stop_last_trials=False,  # the last epoch's trials are still to be judged
        )
    if options.scheduler == "median":
        return _Median(
            time_attr=EPOCH,
            metric=SCORE,
            mode="max",
            grace_period=options.grace_epochs,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # never pause one for another
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]
