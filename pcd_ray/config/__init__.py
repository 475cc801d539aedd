"""Every option of a run: documented, checked where it is declared, frozen.

A configuration is a YAML file that lists what differs from the defaults, plus overrides
``dotted.key=value`` from the command line. An option's type says how its value is read: text as it
stands, whatever YAML would make of it, everything else as YAML. Origins in brackets: [code] the
authors' released code, [ours] decided here. No value here is claimed to stand in the paper.

Sections are declared in ``run.py`` (``run``, ``export``), ``data.py`` (``data``, ``augment``),
``teacher.py``, ``student.py``, ``loss.py`` (``pairing``, ``loss``), ``train.py`` (``optim``,
``train``), ``eval.py``, ``eval_tasks.py``, ``tune.py`` and ``scale.py``; a section within a section
stands above it in its file. A new one gets a field of its parent (of ``Config`` in ``schema.py``,
at the top), a line in ``resume.py`` if a resumed run may set it anew, and its name below.
"""

from pcd_ray.config.data import AugmentConfig, DataConfig, SourceConfig
from pcd_ray.config.eval import EvalConfig
from pcd_ray.config.eval_tasks import DetectConfig, LinearConfig, SegmentConfig
from pcd_ray.config.files import (
    config_from_argv,
    config_from_file,
    config_from_values,
    config_to_values,
    is_override,
    overridden,
    parse_yaml,
    to_yaml,
    with_values,
)
from pcd_ray.config.loss import LossConfig, PairingConfig
from pcd_ray.config.problems import nearest_option
from pcd_ray.config.resume import MAY_CHANGE_ON_RESUME, changed_options
from pcd_ray.config.run import ExportConfig, NodesConfig, RunConfig
from pcd_ray.config.scale import ScaleConfig
from pcd_ray.config.schema import Config, option_names, option_value
from pcd_ray.config.student import MhsaConfig, StudentConfig
from pcd_ray.config.teacher import (
    AdaptorConfig,
    HeadFitConfig,
    TeacherCacheConfig,
    TeacherConfig,
)
from pcd_ray.config.train import OptimConfig, TrainConfig
from pcd_ray.config.tune import TuneConfig

__all__ = [
    "MAY_CHANGE_ON_RESUME",
    "AdaptorConfig",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DetectConfig",
    "EvalConfig",
    "ExportConfig",
    "HeadFitConfig",
    "LinearConfig",
    "LossConfig",
    "MhsaConfig",
    "NodesConfig",
    "OptimConfig",
    "PairingConfig",
    "RunConfig",
    "ScaleConfig",
    "SegmentConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherCacheConfig",
    "TeacherConfig",
    "TrainConfig",
    "TuneConfig",
    "changed_options",
    "config_from_argv",
    "config_from_file",
    "config_from_values",
    "config_to_values",
    "is_override",
    "nearest_option",
    "option_names",
    "option_value",
    "overridden",
    "parse_yaml",
    "to_yaml",
    "with_values",
]
