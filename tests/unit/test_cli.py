import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stored_run import store_run

from pcd_ray import __version__
from pcd_ray.cli import _run, main

ROOT = Path(__file__).parents[2]
VERBS = ("demo", "pack", "train", "eval", "inspect", "export")


@pytest.fixture
def images(tmp_path: Path) -> str:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    return str(folder)


def in_new_process(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "pcd_ray", *words],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_that_takes_time(words: list[str]) -> None:
    code = f"""
import sys
from pcd_ray.cli import main
try:
    main({words!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
print(sorted({{"ray", "torch", "numpy", "pyarrow", "pydantic", "yaml"}} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=300, env=environment,
    )  # fmt: skip
    assert found.stdout.splitlines()[-1] == "[]"


def test_a_wrong_option_is_refused_before_anything_heavy_is_loaded() -> None:
    commands = (
        *("train loss.temprature=3", "tune tune.trils=3", "pack data.sharts=x", "demo run.nam=x"),
        *("eval knn runs/a loss.temprature=3", "export runs/a export.pth=x"),
    )
    code = f"""
import sys
from pcd_ray.cli import main
for command in {commands!r}:
    assert main(command.split()) == 2, command
    assert not {{"ray", "torch", "pyarrow", "PIL", "cv2"}} & set(sys.modules), command
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.stderr.count("did you mean") == len(commands)


def test_help_names_every_verb_and_its_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {verb} " in text for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        assert f"Form: pcd-ray {verb}" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pcd-ray {__version__}\n"


def test_a_working_folder_that_is_gone_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["inspect", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the working folder cannot be used (No such file or directory)")


def test_modules_of_the_working_folder_hide_none_of_ours(tmp_path: Path, images: str) -> None:
    for name in ("random", "json", "PIL", "yaml", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('hidden')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-m", "pcd_ray", "inspect", images, "--json"],
        capture_output=True, text=True, check=True, timeout=300, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(found.stdout)["images"] == 3


def test_sigterm_ends_what_runs_in_words() -> None:
    def waits(_: argparse.Namespace) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    outcome = _run(argparse.Namespace(run=waits, traceback=False))
    assert (outcome["exit_code"], outcome["error"].partition(";")[0]) == (130, "stopped")
    assert signal.getsignal(signal.SIGTERM) is before


def test_flags_may_stand_anywhere(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--json", "inspect", images],
        ["inspect", "--json", images],
        ["inspect", images, "--json"],
        ["inspect", images, "--traceback", "--json"],
    ):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 3


def test_a_result_is_a_table_or_json_and_stands_alone_on_stdout(images: str) -> None:
    found = in_new_process("inspect", images, "--json")
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout) == {
        "kind": "images",
        "images": 3,
        "bytes": sum(path.stat().st_size for path in Path(images).iterdir()),
        "classes": 0,
        "formats": {"png": 3},
    }


def test_a_table_has_a_line_for_each_value(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", images]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["kind", "images"],
        ["images", "3"],
        ["bytes", str(sum(path.stat().st_size for path in Path(images).iterdir()))],
        ["classes", "0"],
        ["formats.png", "3"],
    ]
    assert len({line.index(line.split()[1], len(line.split()[0])) for line in lines}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "nowhere: there is no such file or folder; check the path"),
        (["inspect"], "got 0 arguments; the form is: pcd-ray inspect PATH"),
        (["inspect", "a", "b"], "got 2 arguments; the form is: pcd-ray inspect PATH"),
        (["inspect", ""], "got an empty path; the form is: pcd-ray inspect PATH"),
        (["export"], "got 0 arguments; the form is: pcd-ray export RUN"),
        (["export", "export.path=a"], "got 0 arguments; the form is: pcd-ray export RUN"),
        (["export", "nowhere"], "nowhere holds no complete checkpoint"),
        (["export", "nowhere", "export.pth=a"], "did you mean export.path?"),
        (["export", "nowhere", "student.backbone=a"], "'student.backbone=a' is none of export.*"),
        (["export", "nowhere", "exports.path=a"], "'exports.path=a' is none of export.*"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "train.num_wokers=2"], "did you mean train.num_workers?"),
        (["train", "optim.name=lar"], "optim.name='lar' is not one of 'lars' or 'adamw'"),
        (["train", "optim.name=lar"], "did you mean 'lars'?"),
        (["train", "loss.temperature=0"], "loss.temperature must be > 0, got 0.0"),
        (["train", "train.global_batch_size=10", "train.num_workers=3"], "use 9 or 12"),
        (["train", "a.yaml", "b.yaml"], "cannot be read"),
        (["demo", "loss.temperature=0"], "loss.temperature must be > 0, got 0.0"),
        (["pack", "data.sorces=a"], "did you mean data.sources?"),
        (["eval", "knn", "untrained", "eval.out=a.yaml"], "eval.knn_train"),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_two(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["inspect", "nowhere", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "inspection.py" in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB; see pcd-ray --help"),
        (["trian"], "'trian' is not a verb; did you mean train?"),
        (
            ["--json", "zzz"],
            "'zzz' is not a verb; choose from demo, pack, train, tune, eval, inspect",
        ),
        (["train", "--dryrun"], "pcd-ray train has no flag --dryrun; did you mean --dry-run?"),
        (["train", "--dry_run", "a.yaml"], "did you mean --dry-run?"),
        (["train", "-dryrun"], "pcd-ray train has no flag -dryrun; did you mean --dry-run?"),
        (["eval", "knn", "--fracton=0.1"], "has no flag --fracton; did you mean --fraction?"),
        (["inspect", "--verfy", "x"], "did you mean --verify?"),
        (["pack", "--resutl", "x"], "did you mean --result?"),
        (["export", "--josn"], "did you mean --json?"),
        (
            ["pack", "data.sources=a\udce9"],
            r"data.sources=a\xe9: the argument is not UTF-8; rename",
        ),
        (["pack", "--dry-run"], "has no flag --dry-run; choose from --json, --traceback, --result"),
        (["eval", "detect", "--fraction", "much"], "argument --fraction: invalid float value: 'mu"),
        (["train", "--result"], "argument --result: expected one argument; see pcd-ray train"),
    ],
)
def test_an_unknown_verb_or_flag_is_refused_with_the_nearest_or_the_known_ones(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_a_reader_that_leaves_ends_a_command_quietly(words: list[str], images: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -0` does, whenever it is scheduled
    target = [] if words == ["--help"] else [images]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse itself would leave quietly, with 0
    with open(writer, "w") as closed:
        found = subprocess.run(
            [sys.executable, "-m", "pcd_ray", *words, *target],
            stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=300,
            env=environment,
        )  # fmt: skip
    assert (found.returncode, found.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    "words", [["train"], ["tune"], ["pack"], ["demo"], ["eval", "knn", "untrained"]]
)
def test_a_file_in_a_folder_with_an_equals_sign_is_the_configuration(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x=1").mkdir()
    Path("x=1/a.yaml").write_text("loss: {temprature: 1}")
    assert main([*words, "x=1/a.yaml"]) == 2
    assert "did you mean loss.temperature?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lr=0.1", "exp.lr=0.1"])
def test_a_runs_folder_may_hold_an_equals_sign(
    name: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = store_run(tmp_path, 1, run={"name": name})
    monkeypatch.chdir(Path(folder.uri).parent)
    assert main(["export", name, "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["path"]
    assert path == folder.file("exported", "test_resnet.safetensors")
    assert main(["inspect", name]) == 0
    assert main(["eval", "knn", name]) == 2
    assert "eval.knn_train" in capsys.readouterr().err


def test_export_does_what_the_runs_options_say_unless_it_is_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "chosen.safetensors"
    folder, _ = store_run(tmp_path, 1, export={"path": str(place), "keep_neck": True})

    def exported(*words: str) -> dict[str, str]:
        assert main(["export", folder.uri, *words, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    assert exported()["path"] == str(place)
    assert place.exists()
    told = exported(f"export.path={tmp_path}/other.safetensors")
    assert told["path"] == f"{tmp_path}/other.safetensors"
    assert told["neck_path"] == f"{tmp_path}/other_mhsa.safetensors"  # still as the run says
    usual = exported("export.path=", "export.keep_neck=false")
    assert usual["path"] == folder.file("exported", "test_resnet.safetensors")
    assert usual["neck_path"] == ""


def test_an_export_is_printed_with_the_lines_that_load_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = store_run(tmp_path, 1)
    assert main(["export", folder.uri]) == 0
    out = capsys.readouterr().out
    path = folder.file("exported", "test_resnet.safetensors")
    assert out.splitlines()[0].split() == ["path", path]
    assert out.splitlines()[-3:] == [
        "import safetensors.torch, timm",
        "model = timm.create_model('test_resnet', num_classes=0)",
        f"model.load_state_dict(safetensors.torch.load_file({path!r}))",
    ]
    assert "base_lr" not in out


def test_a_script_of_jobs_is_the_verb(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "export.py"), str(tmp_path / "nowhere")],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert "holds no complete checkpoint" in found.stderr


@pytest.mark.parametrize("kind", ["knn", "linear", "segment"])
def test_a_fraction_is_of_detection_alone(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", kind, "untrained", "--fraction", "0.1"]) == 2
    assert "error: --fraction=0.1 shortens detection alone; leave it out" in capsys.readouterr().err


def test_what_came_of_a_verb_is_kept_where_exit_codes_are_lost(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "results" / "a.json"
    assert main(["inspect", images, "--result", str(kept), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(kept.read_text()) == {"exit_code": 0, "error": "", "summary": printed}
    assert main(["inspect", "nowhere", f"--result={kept}"]) == 2
    error = capsys.readouterr().err.rstrip("\n")
    assert json.loads(kept.read_text()) == {"exit_code": 2, "error": error, "summary": {}}


def test_a_result_that_cannot_be_kept_is_an_error_of_its_own(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["inspect", images, "--result", str(tmp_path / "file" / "a.json")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --result: {tmp_path}/file/a.json cannot be")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(int(signal.SIGTERM))])
def test_a_stop_is_told_in_words_whoever_asked_for_it(stop: BaseException) -> None:
    def verb(_options: argparse.Namespace) -> dict[str, Any]:
        raise stop

    outcome = _run(argparse.Namespace(run=verb))
    assert outcome["exit_code"] == 130
    assert outcome["error"] == "stopped; the same command goes on from the last checkpoint"


def test_an_exit_that_is_no_stop_goes_on() -> None:
    with pytest.raises(SystemExit, match="3"):
        _run(argparse.Namespace(run=lambda _: sys.exit(3)))


def test_log_lines_of_rays_core_do_not_reach_the_console() -> None:
    code = """
import os, sys
from pcd_ray import cli
def verb(options):
    os.write(2, b"[2026-11-29 02:03:48,888 E 12 345] core_worker.cc:2465: Actor with class ")
    os.write(2, b"name: 'A' has constructor arguments in the object store\\nfirst\\n")
    print("second", file=sys.stderr)
    os.write(2, b"[2026-11-29 02:03:48,888 W 12 345] (raylet) node_manager.cc:1: gone\\nno newline")
    return {"value": 1}
cli._VERBS = (("pack", "", verb, ""),)
sys.exit(cli.main(["pack"]))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.stderr == "first\nsecond\nno newline"
    assert found.stdout == "value  1\n"
