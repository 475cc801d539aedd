import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pcd_ray.config import (
    MAY_CHANGE_ON_RESUME,
    Config,
    EvalConfig,
    RunConfig,
    changed_options,
    config_from_argv,
    config_from_file,
    config_from_values,
    config_to_values,
    is_override,
    option_names,
    option_value,
    parse_yaml,
    to_yaml,
)
from pcd_ray.errors import ConfigError


def problem(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_values(values)
    return str(caught.value)


def at(name: str, value: Any) -> dict[str, Any]:
    """Return nested values with one option set."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def test_yaml_of_a_config_is_the_config() -> None:
    config = config_from_values(
        {
            "run": {"name": "a", "seed": 3},
            "data": {"sources": ["one", {"uri": "two", "weight": 0.5}]},
            "teacher": {"mean": [0.1, 0.2, 0.3], "kwargs": {"pad_type": "same"}},
            "optim": {"base_lr": 1e-5},
        }
    )
    assert config_from_values(yaml.safe_load(to_yaml(config))) == config
    assert config_from_values(config_to_values(config)) == config
    assert config_from_values({}) == Config()


def test_everything_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().loss.temperature = 0.1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss.temprature", 0.1, "loss.temprature: unknown option; did you mean loss.temperature?"),
        ("temperature", 0.1, "temperature: unknown option; did you mean loss.temperature?"),
        ("loss.queue_sise", 9, "did you mean loss.queue_size?"),
        ("optim.lr", 3.0, "optim.lr: unknown option; did you mean optim.base_lr?"),
        ("train.base_lr", 3.0, "did you mean optim.base_lr?"),
        ("techer.arch", "resnet50", "techer: unknown option; did you mean teacher?"),
        ("student.mhsaa.depth", 1, "student.mhsaa: unknown option; did you mean student.mhsa?"),
        ("student.mhsa.dept", 1, "did you mean student.mhsa.depth?"),
        ("zzz", 1, "zzz: unknown option; see the options in pcd_ray/config/"),
        ("optim.name", "lar", "optim.name='lar' is not one of 'lars' or 'adamw'; did you mean"),
        ("pairing.kind", "same_viw", "did you mean 'same_view'?"),
        ("train.num_workers", "two", "train.num_workers='two': give a whole number, or [least, mo"),
        ("train.num_workers", 1.5, "train.num_workers=1.5: give a whole number, or [least, most]"),
        ("train.num_workers", [1, 2, 3], "train.num_workers=[1, 2, 3]: give a whole number, or"),
        ("train.num_workers", [4, 2], "must be [least, most] with 1 <= least <= most, got (4, 2)"),
        ("run.name", 2024, "run.name=2024: is not a string; give one"),
        ("run.name", "a/b", "run.name must be a plain name, got 'a/b'"),
        ("loss", 3, "loss=3: is a section; write its options as loss.option=value"),
        ("loss", None, "loss=None: is a section"),
        ("student.output_stride", 4, "student.output_stride=4 is not one of 0, 8, 16 or 32"),
        ("student.grid", "upsampel", "did you mean 'upsample'?"),
        (
            "student",
            {"output_stride": 8, "kwargs": {"output_stride": 16}},
            "student.output_stride must be 0 where student.kwargs holds output_stride, got 8",
        ),
        (
            "student",
            {"predictor": False, "predictor_hidden": 64},
            "student.predictor_hidden must be 0 where student.predictor is false, got 64",
        ),
        ("data.sources", [{"weight": 2}], "data.sources.0.uri: missing; give a value"),
        ("optim.base_lr", float("inf"), "optim.base_lr=inf: input should be a finite number"),
        ("loss.temperature", float("nan"), "loss.temperature=nan: input should be a finite"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_the_fix(
    name: str, value: Any, message: str
) -> None:
    assert message in problem(at(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.max_bad_fraction", 1.5),
        ("data.max_pixels", 0),
        ("data.max_decode_s", 0.0),
        ("data.shard_mib", 0),
        ("data.images_per_task", 0),
        ("data.prefetch_batches", -1),
        ("data.cpus_per_task", 0),
        ("augment.image_size_px", 4),
        ("augment.min_scale", 0),
        ("augment.max_scale", 1.5),
        ("augment.flip_prob", 1.1),
        ("augment.hue", 0.6),
        ("augment.contrast", -0.1),
        ("teacher.fit.dim", 0),
        ("teacher.fit.images", 1),
        ("teacher.fit.views", 1),
        ("teacher.fit.hidden", 0),
        ("teacher.fit.steps", 0),
        ("teacher.fit.temperature", 0),
        ("teacher.fit.whiten", 2),
        ("teacher.mean", [0, 0, 2]),
        ("teacher.std", [0, 1, 1]),
        ("student.mhsa.heads", 0),
        ("student.mhsa.depth", -1),
        ("student.head_hidden", -1),
        ("student.predictor_hidden", -1),
        ("student.ema", 1),
        ("student.ema", -0.1),
        ("pairing.radius", 0),
        ("loss.temperature", 0),
        ("loss.queue_size", 0),
        ("optim.base_lr", 0),
        ("optim.weight_decay", -1),
        ("optim.warmup_epochs", -1),
        ("optim.final_lr_fraction", 2),
        ("optim.clip_grad_norm", -1),
        ("train.epochs", 0),
        ("train.num_workers", 0),
        ("train.num_workers", [0, 2]),
        ("train.max_preemptions", -2),
        ("train.start_timeout_s", 0),
        ("train.resize_check_s", 0),
        ("train.accumulation_steps", 0),
        ("train.log_every_steps", 0),
        ("train.keep_last", 0),
        ("train.max_failures", -1),
        ("train.cpus_per_worker", -1),
        ("eval.every_epochs", -1),
        ("eval.knn_k", 0),
        ("eval.images_per_forward", 0),
        ("eval.image_size_px", -1),
        ("eval.pixel", [0.5, 1.1]),
        ("eval.pixel", [-0.1, 0.5]),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    section = name.rpartition(".")[0]  # scales are checked as a pair
    assert section in problem(at(name, value))


def test_all_problems_are_told_at_once() -> None:
    found = problem({"loss": {"temperature": 0}, "optim": {"base_lr": -1, "nam": "lars"}})
    assert found.splitlines() == [
        "loss.temperature must be > 0, got 0.0",
        "optim.nam: unknown option; did you mean optim.name?",
    ]
    found = problem({"loss": {"temperature": 0}, "optim": {"base_lr": -1}})
    assert len(found.splitlines()) == 2


@pytest.mark.parametrize(
    ("batch", "workers", "parts", "fix"),
    [(10, 3, 1, "use 9 or 12"), (10, 2, 3, "use 6 or 12"), (2, 4, 1, "use 4")],
)
def test_a_batch_that_does_not_split_names_those_that_do(
    batch: int, workers: int, parts: int, fix: str
) -> None:
    values = {
        "global_batch_size": batch,
        "num_workers": workers,
        "accumulation_steps": parts,
    }
    message = problem({"train": values})
    assert message.startswith(f"train.global_batch_size={batch} does not split over")
    assert message.endswith(fix)


def test_elastic_workers_are_a_pair_in_files_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {global_batch_size: 64, num_workers: [2, 4]}\n")
    train = config_from_file(str(file)).train
    assert (train.num_workers, train.min_workers, train.max_workers) == ((2, 4), 2, 4)
    file.write_text(to_yaml(config_from_file(str(file), ["train.num_workers=[1,8]"])))
    assert config_from_file(str(file)).train.num_workers == (1, 8)
    assert config_from_file("", ["train.num_workers=8"]).train.min_workers == 8


def test_what_is_judged_needs_both_collections() -> None:
    assert EvalConfig(knn_train="a", knn_test="b").knn_k == 20
    for name in ("knn_train", "knn_test"):
        assert "given together with eval.knn_train" in problem({"eval": {name: "a"}})


def test_overrides_win_over_the_file_and_are_yaml(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("loss: {temperature: 0.1, queue_size: 7}\ntrain:\n")
    words = ["loss.temperature=1e-1", "train.num_workers=2", "run.name=", "data.sources=[a, b]"]
    with pytest.raises(ConfigError, match=r"run\.name must be a plain name, got ''"):
        config_from_file(str(file), words)
    words[2] = "student.kwargs={output_stride: 16}"
    config = config_from_argv(["pcd-ray", str(file), *words])
    assert (config.loss.temperature, config.loss.queue_size) == (0.1, 7)
    assert config.train.num_workers == 2
    assert [source.uri for source in config.data.sources] == ["a", "b"]
    assert config.student.kwargs == {"output_stride": 16}
    assert config_from_argv(["pcd-ray", "data.sources=one"]).data.sources[0].uri == "one"


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "a.yaml: cannot be read (No such file or directory); give a YAML file"),
        ("a: [", [], "is not YAML"),
        ("- a", [], "holds list; give a mapping of sections"),
        ("", ["loss.temperature"], "'loss.temperature' is no override; write dotted.key=value"),
        ("", ["=3"], "is no override"),
        ("", ["loss.temperature=[1"], "loss.temperature='[1': is not YAML (line 1: expected ','"),
        ("", ["data.sources=[a, b #2]"], "data.sources='[a, b #2]': is not YAML"),
        ("", ["student.kwargs={a: 1, a: 2}"], "student.kwargs.a is given twice, in line 1"),
        ("loss: 3", ["loss.temperature=1"], "loss is 3, not a section"),
        ("data: {sources: [null]}", [], "data.sources.0=None: write a mapping of its options"),
        (
            "train: {epochs: 3}\nloss:\ntrain: {keep_last: 1}",
            [],
            "is given twice, in lines 1 and 3",
        ),
        ("train:\n  epochs: 3\n  'epochs': 4", [], "train.epochs is given twice, in lines 2 and 3"),
        ("data:\n sources:\n - {uri: a}\n - uri: b\n   uri: c", [], "1.uri is given twice, in"),
        ("train: {epochs: 3}\ntrain.keep_last: 4", [], "train (line 1) and train.keep_last ("),
        ("train.epochs: 3\ntrain: {keep_last: 4}", [], "train.epochs (line 1) and train (line 2)"),
        ("tune: {space: {loss.kind: 1,\n loss: {kind: 2}}}", [], "space.loss.kind is given twice"),
        ("<<: {run: {name: a}}", [], "uses merge keys (<<), which are not read"),
        ("optim.base_lr: 0.1", [], "optim.base_lr: dotted names are for the command line"),
        ("optim.base_lr: 0.1", [], "write optim: {base_lr: 0.1}"),
        ("teacher: {adaptor.rule: naive}", [], "write teacher: {adaptor: {rule: naive}}"),
        ("teacher.fit: {dim: 3}", [], "write teacher: {fit: {dim: 3}}"),
        ("train: {train.epochs: 3}", [], "write train: {epochs: 3}"),
        ("optim.base_lrr: 0.1", [], "did you mean optim.base_lr?"),
        (
            "tune.storage: 'postgresql://me:pw@host/db'",
            [],
            "write tune: {storage: 'postgresql://***'}",
        ),
        ("run: \x07", [], "a.yaml: is not YAML (unacceptable character #x0007: special characters"),
    ],
)
def test_a_bad_file_or_override_is_refused_in_words(
    content: str | None, words: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        config_from_file(str(file), words)
    assert message in str(caught.value)


def test_a_byte_order_mark_is_read_and_other_encodings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("loss: {temperature: 0.3}", "utf-8-sig")
    assert config_from_file(str(file)).loss.temperature == 0.3
    file.write_text("loss: {temperature: 0.3}", "utf-16")
    with pytest.raises(ConfigError, match=r"a\.yaml: is not UTF-8 text .*; save it as UTF-8"):
        config_from_file(str(file))


@pytest.mark.parametrize(
    "text",
    [
        *("my photos #2", " a: b ", "it's", '"a b"', "null", "~", "yes", "on", "1e3", "007", "a=b"),
        *("2026-11-25", "12:30", "*.jpg", "- a", "!x", "&a", "%a", "@a", "[2024] a", "{a"),
    ],
)
def test_text_behind_an_equals_sign_is_taken_as_it_is(text: str) -> None:
    names = ("run.name", "data.sources", "teacher_2.weights")
    config = config_from_argv(["pcd-ray", *(f"{name}={text}" for name in names)])
    assert config.run.name == text
    assert [source.uri for source in config.data.sources] == [text]
    assert config.teacher_2 is not None
    assert config.teacher_2.weights == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.node_labels.zone=1", {"zone": "1"}),
        ("train.node_labels={zone: 1, spot: on}", {"zone": "1", "spot": "on"}),
        ("student.head_norm=off", "off"),
        ("train.compile=on", True),
        ("optim.base_lr=3e-2", 0.03),
        ("student.kwargs={act: 0.5relu, v: 1.2.3}", {"act": "0.5relu", "v": "1.2.3"}),
        ("student.kwargs.a=-.5E+0", {"a": -0.5}),
        ("loss.queue_size=1e3", 1000),
        ("loss.queue_size=1_000", 1000),
        ("run.seed=010", 10),
        ("student.output_stride=8", 8),
        ("student.kwargs={a: 1e-1, b: 010, c: no}", {"a": 0.1, "b": 10, "c": False}),
        ("student.kwargs.a=1e-1", {"a": 0.1}),
        ("eval.pixel=[.5, 5e-1]", (0.5, 0.5)),
        ("teacher.mean=null", None),
        ("data.sources=[2019, {uri: 007, weight: 2}]", (("2019", 1.0), ("007", 2.0))),
        ("data.sources={uri: a b, weight: 2}", (("a b", 2.0),)),
        ("tune.space={optim.base_lr: {log: [3e-2, +1]}}", {"optim.base_lr": {"log": [0.03, 1]}}),
        ("tune.space={loss.kind: {choice: [1e3, on]}}", {"loss.kind": {"choice": ["1e3", "on"]}}),
        ("tune.space.loss.kind={choice: [1e3, on]}", {"loss": {"kind": {"choice": ["1e3", "on"]}}}),
        ("tune.space.optim.base_lr={log: [3e-2, 1]}", {"optim": {"base_lr": {"log": [0.03, 1]}}}),
    ],
)
def test_the_type_of_an_option_says_how_its_value_is_read_here_and_in_a_file(
    override: str, value: Any, tmp_path: Path
) -> None:
    name, _, text = override.partition("=")
    option = re.sub(r"\.(zone|a|loss\.kind|optim\.base_lr)$", "", name)
    (tmp_path / "a.yaml").write_text(
        "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(name.split(".")))[:-1]
        + f" {text}"
    )
    for config in (config_from_file("", [override]), config_from_file(str(tmp_path / "a.yaml"))):
        found = option_value(config, option)
        if option == "data.sources":
            found = tuple((source.uri, source.weight) for source in found)
        assert found == value
        assert type(found) is type(value)
        assert config_from_values(parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize(
    "path",
    [
        *("lr=0.1.yaml", "runs/lr=0.1.yaml", "a=1/run.yml", "exp.lr=1.yaml", "exp.lr=1"),
        *("train=2.yaml", "train.epochs=2.yaml", "train.epochs=2"),
    ],
)
def test_a_file_whose_path_holds_an_equals_sign_is_a_file(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("run: {name: found}")
    assert config_from_argv(["pcd-ray", path, "run.root=a=b"]).run == RunConfig(
        name="found", root="a=b"
    )


@pytest.mark.parametrize(
    "word", ["teacher.weights=x.yaml", "train.epochs=2", "epochs=2", "trian.epochs=2", "a=b", "a="]
)
def test_an_override_is_none(word: str) -> None:
    assert is_override(word)
    assert not is_override("nowhere/lr=1.yaml")


def test_changes_are_listed_where_they_matter_and_the_seed_does() -> None:
    old = config_from_values({"train": {"global_batch_size": 8}})
    new = config_from_values(
        {
            "run": {"name": "other", "seed": 1, "root": "s3://b"},
            "loss": {"temperature": 0.1},
            "train": {"global_batch_size": 8, "num_workers": 2, "log_every_steps": 3},
            "eval": {"every_epochs": 2},
            "data": {"sources": ["x"], "images_per_task": 3},
        }
    )
    assert changed_options(old, new) == ["run.seed: 0 -> 1", "loss.temperature: 0.2 -> 0.1"]
    assert changed_options(old, old) == []


def test_another_kind_of_loss_is_a_change_that_matters() -> None:
    old, new = Config(), config_from_values({"loss": {"kind": "mse"}})
    assert changed_options(old, new) == ["loss.kind: 'pixel' -> 'mse'"]


def test_pairing_positions_that_are_pooled_is_refused() -> None:
    image = {"loss": {"kind": "image"}}
    message = problem(image | {"pairing": {"kind": "cross_view_geometric"}})
    assert message.startswith("pairing.kind must be same_view (one crop) or cross_view_index (two)")
    assert "loss.kind=image" in message
    assert message.endswith("got 'cross_view_geometric'")
    assert (
        config_from_values(image | {"pairing": {"kind": "cross_view_index"}}).loss.kind == "image"
    )
    config_from_values({"loss": {"kind": "mse"}, "pairing": {"kind": "cross_view_geometric"}})


def test_a_second_teacher_is_given_by_its_options_and_changed_as_a_whole() -> None:
    one = config_from_file("")
    assert (one.teacher_2, list(one.teachers)) == (None, ["teacher"])
    words = ["teacher_2.weights=b.pth", "teacher_2.fit.dim=5", "teacher_2.weight=0.5"]
    two = config_from_file("", words)
    assert two.teacher_2 is not None
    assert (two.teacher_2.weights, two.teacher_2.fit.dim, two.teacher_2.weight) == ("b.pth", 5, 0.5)
    assert two.teachers == {"teacher": one.teacher, "teacher_2": two.teacher_2}
    assert config_from_values(config_to_values(two)) == two
    assert changed_options(one, two) == ["teacher_2: none -> given"]
    assert changed_options(two, one) == ["teacher_2: given -> none"]
    moved = config_from_file("", [*words[1:], "teacher_2.weights=c.pth", "teacher_2.head=none"])
    assert changed_options(two, moved) == ["teacher_2.head: 'auto' -> 'none'"]


@pytest.mark.parametrize(
    ("override", "story"),
    [
        ("teacher_2.wieghts=x", r"teacher_2\.wieghts: .*did you mean teacher_2\.weights\?"),
        ("teacher_2.fit.dimm=2", r"teacher_2\.fit\.dimm: .*did you mean teacher_2\.fit\.dim\?"),
        ("teacher_2.weight=0", r"teacher_2\.weight must be > 0, got 0"),
        ("teacher.weight=-1", r"teacher\.weight must be > 0, got -1"),
        ("teacher_2=x", r"teacher_2='x': is a section; write .* teacher_2\.option=value"),
    ],
)
def test_wrong_options_of_the_second_teacher_are_named_as_its_own(
    override: str, story: str
) -> None:
    with pytest.raises(ConfigError, match=story):
        config_from_file("", [override])


def test_both_teachers_maps_are_stored_or_neithers() -> None:
    second = {"arch": "resnet18", "cache": {"views": 3}}
    told = problem({"teacher_2": second})
    assert told.startswith("teacher_2.cache.views must be 0 as teacher.cache.views is, since both")
    assert told.endswith("got 3")
    both = config_from_values({"teacher": {"cache": {"views": 3}}, "teacher_2": second})
    assert [teacher.cache.views for teacher in both.teachers.values()] == [3, 3]
    assert problem({"teacher_2": {"cache": {"views": -1}}}) == (
        "teacher_2.cache.views must be >= 0, got -1"
    )


def test_a_cache_may_be_moved_but_not_be_of_other_views() -> None:
    def with_cache(**options: Any) -> Config:
        return config_from_values({"teacher": {"cache": options}})

    assert changed_options(with_cache(path="a"), with_cache(path="b")) == []
    assert changed_options(with_cache(), with_cache(views=2)) == ["teacher.cache.views: 0 -> 2"]


def test_every_option_has_a_name_that_finds_it_and_harmless_ones_exist() -> None:
    names = list(option_names())
    assert len(set(names)) == len(names)
    for name in names:
        option_value(Config(), name)
    sections = {name.rpartition(".")[0] for name in names}
    assert set(MAY_CHANGE_ON_RESUME) <= {*names, *sections}


@pytest.mark.parametrize("name", ["run.root", "data.shards", "data.sources", "eval.knn_train"])
def test_a_uri_with_credentials_is_refused_without_repeating_them(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}.*: .*by the environment") as refused:
        config_from_file("", [f"{name}=s3://KEYID:hunter2@bucket/a"])
    assert "hunter2" not in str(refused.value)
    assert "KEYID" not in str(refused.value)


def test_yaml_that_would_grow_or_nests_too_deep_is_refused_in_words(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n"
    texts = {bomb: "aliases", "a: " + "[" * 3000: "deep", "a: !!python/name:os.system": "YAML"}
    for text, words in texts.items():
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            config_from_file(str(tmp_path / "a.yaml"))


def test_the_best_are_kept_by_a_score_that_is_taken() -> None:
    train = {"keep_best": 2}
    with pytest.raises(ConfigError, match=r"keep_best_by=knn_top1 needs eval\.every_epochs"):
        config_from_values({"train": train})
    taken = {"every_epochs": 1, "knn_train": "a", "knn_test": "b"}
    assert config_from_values({"train": train, "eval": taken}).train.keep_best == 2
    by_probe = train | {"keep_best_by": "segmentation_miou"}
    with pytest.raises(ConfigError, match=r"needs eval\.probe_every_epochs"):
        config_from_values({"train": by_probe, "eval": taken})
