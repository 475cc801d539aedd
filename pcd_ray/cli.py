"""``pcd-ray VERB``: parse, call one function, print what it returns.

Results go to stdout, logs to stderr. Exit code 2: an error that the user can mend; 1: a bug; 130:
stopped by Ctrl-C, SIGTERM or ``ray job stop``.
Nothing heavy is imported before a verb needs it, so that ``--help`` is instant.
"""

import argparse
import contextlib
import difflib
import importlib.resources
import json
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from pcd_ray import __version__
from pcd_ray.errors import ConfigError, PcdError

_FORM = "pcd-ray {verb} {target} [dotted.key=value ...] [--json]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            print(end="", flush=True)  # also after --help, which leaves by SystemExit
    except BrokenPipeError:  # the reader has left, as `head` does
        for stream in (1, 2):  # Python flushes both when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return 128 + signal.SIGPIPE


def _main(words: Sequence[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in ray_cluster.PASSIVE_THREADS
    try:
        _check_utf8(words)
        options = _parsed(_joined(words))
    except PcdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome = _run(options)
    if options.result:
        outcome = _kept(outcome, options.result)
    if outcome["error"]:
        print(outcome["error"], file=sys.stderr)  # the last line of a job's log
    elif options.json:
        print(json.dumps(outcome["summary"], indent=2))
    else:
        _print_table(outcome["summary"])
    code: int = outcome["exit_code"]
    return code


def _check_utf8(words: Sequence[str]) -> None:
    """Refuse arguments that Ray and configuration files cannot hold.

    Raises:
        PcdError: one is not UTF-8.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(word).decode("utf-8", "backslashreplace")
            raise PcdError(
                f"{shown}: the argument is not UTF-8; rename the file or folder"
            ) from error


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Return the verb, its words and flags.

    Raises:
        PcdError: a verb or a flag is unknown.
    """
    # flags may stand anywhere among the overrides: argparse wants them in one place
    words = sorted(words, key=lambda word: word.startswith("--"))
    verbs = [name for name, *_ in _VERBS]
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb and verb not in verbs:
        raise PcdError(f"{verb!r} is not a verb{_nearest(verb, verbs)}")
    options, unknown = _parser().parse_known_args(words)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [f"--{name.replace('_', '-')}" for name in vars(options)]
        flags = [each for each in known if each not in ("--words", "--run")]
        raise PcdError(f"pcd-ray {verb} has no flag {flag}{_nearest(flag, flags)}")
    return options


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(known)}"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as all other errors are said."""

    def error(self, message: str) -> NoReturn:
        raise PcdError(f"{message}; see {self.prog} --help")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the verb and return what came of it, as ``--result`` keeps it."""
    verb: Callable[[argparse.Namespace], dict[str, Any]] = options.run
    try:
        # Ray prints on stdout too
        with _exits_on_sigterm(), _without_rays_log(), contextlib.redirect_stdout(sys.stderr):
            _check_working_folder()
            return {"exit_code": 0, "error": "", "summary": verb(options)}
    except PcdError as error:
        found: Exception = error
        code, story = 2, f"error: {error}"
    except Exception as error:
        found = error
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        code, story = 1, f"unexpected {type(error).__name__}: {last} (see --traceback)"
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != signal.SIGTERM:
            raise
        return _failed(130, "stopped; the same command goes on from the last checkpoint")
    if options.traceback:
        traceback.print_exception(found)
    return _failed(code, story)


def _check_working_folder() -> None:
    """Refuse to run in a folder that has been deleted, where Ray and torch fail without a word."""
    try:
        os.getcwd()
    except OSError as error:
        raise PcdError(
            f"the working folder cannot be used ({error.strerror}): it has been deleted or moved; "
            "change to one that exists (cd), then rerun the same command"
        ) from error


@contextlib.contextmanager
def _exits_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise ``SystemExit`` from the start, as Ray does once it runs."""
    if threading.current_thread() is not threading.main_thread():  # no signal reaches it
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _without_rays_log() -> Iterator[None]:
    """Keep the log lines of Ray's C++ core off stderr; they are in Ray's own files.

    It writes them to the file descriptor, at levels that no setting turns off without a line of its
    own: that each actor of a data pool could not be restarted, say, or that a node has gone.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=_pass_on, args=(reading, stderr), daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os.dup2(stderr, 2)  # ends the pipe, unless a child process still holds it
        thread.join(_LAST_LINES_S)


def _pass_on(reading: int, stderr: int) -> None:
    """Copy lines from a pipe to ``stderr``, Ray's own left out."""
    rest = b""
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        while data := os.read(reading, 65_536):
            *lines, rest = (rest + data).split(b"\n")
            os.write(stderr, b"".join(line + b"\n" for line in lines if not _RAYS.match(line)))
        os.write(stderr, rest)
    os.close(reading)  # a writer is told so, as without this


def _failed(code: int, story: str) -> dict[str, Any]:
    return {"exit_code": code, "error": story, "summary": {}}


def _kept(outcome: dict[str, Any], uri: str) -> dict[str, Any]:
    """Write what came of a verb; return it, or the error of the writing after the verb's own."""
    from pcd_ray import storage

    try:
        storage.write_text(uri, json.dumps(outcome, indent=2))
    except PcdError as error:
        stories = [outcome["error"], f"error: --result: {error}"]
        return _failed(outcome["exit_code"] or 2, "\n".join(filter(None, stories)))
    return outcome


def _joined(words: Sequence[str]) -> list[str]:
    """Return the words with ``--fraction 0.1`` as one: what belongs together stays together."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--fraction", "--result"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def run_job(verb: str, argv: Sequence[str]) -> None:
    """Run a verb as a script of ``jobs/``, with the same arguments and exit codes."""
    sys.exit(main([verb, *argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pcd-ray",
        description="Pixel-Wise Contrastive Distillation on Ray. Options are listed, with their "
        "meaning, in pcd_ray/config/; any of them can be given as dotted.key=value.",
    )
    parser.add_argument("--version", action="version", version=f"pcd-ray {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, target, run, text in _VERBS:
        verb = verbs.add_parser(name, help=text, description=f"{text} Form: {_form(name, target)}")
        verb.add_argument("words", nargs="*", metavar=target or "dotted.key=value")
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.add_argument("--traceback", action="store_true", help="show where an error arose")
        verb.add_argument("--result", metavar="FILE", help="write exit code, error, summary there")
        if name == "demo":
            verb.add_argument(
                "--quick", action="store_true", help="all parts on little data: scores mean little"
            )
        if name == "train":
            verb.add_argument(
                "--dry-run", action="store_true", help="check everything, print the plan, stop"
            )
        if name == "eval":
            verb.add_argument(
                "--compare", action="store_true", help="before further students; one row each"
            )
            verb.add_argument(
                "--fraction", type=float, metavar="F", help="detect: eval.detect.fraction=F"
            )
        if name == "inspect":
            verb.add_argument(
                "--verify", action="store_true", help="read every byte of shards against its hash"
            )
        verb.set_defaults(run=run)
    return parser


def _form(verb: str, target: str) -> str:
    return " ".join(_FORM.format(verb=verb, target=target).split())


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from pcd_ray.config import is_override

    words = options.words
    if not words or is_override(words[0]):
        name = ["run.name=demo_quick"] if options.quick else []
        words = [str(importlib.resources.files("pcd_ray") / "demo.yaml"), *name, *words]
    config = _config(words)
    from pcd_ray.ray_demo import QUICK, DemoSize, demo

    summary: dict[str, Any] = demo(config, QUICK if options.quick else DemoSize()).summary()
    return summary


def _pack(options: argparse.Namespace) -> dict[str, Any]:
    config = _config(options.words)
    from pcd_ray.data.ray_pack import pack
    from pcd_ray.ray_placement import task_of_data, wait_for_data_nodes

    task = task_of_data(config)

    def ready() -> None:
        wait_for_data_nodes(config, task, say=lambda line: print(line, file=sys.stderr))

    return pack(config.data, seed=config.run.seed, ready=ready).summary()


def _train(options: argparse.Namespace) -> dict[str, Any]:
    config = _config(options.words)
    from pcd_ray.train.ray_launch import dry_run, train

    if options.dry_run:
        plan: dict[str, Any] = dry_run(config).summary()
        return plan
    summary = train(config).summary()
    if not options.json:
        del summary["plan"]  # long, told by --dry-run, and not what came of it
    return summary


def _eval(options: argparse.Namespace) -> dict[str, Any]:
    from pcd_ray.config import Config, config_from_file, is_override, overridden

    kind, *words = options.words or [""]
    # without a section it is a student: a run's folder may be called lr=0.1
    overrides = [word for word in words if is_override(word) and "." in word.partition("=")[0]]
    files = [word for word in words if word.endswith((".yaml", ".yml")) and word not in overrides]
    students = [word for word in words if word not in (*overrides, *files)]
    if options.fraction is not None:
        if kind != "detect":
            raise ConfigError(
                f"--fraction={options.fraction:g} shortens detection alone; leave it out of eval "
                f"{kind}, and give fewer steps or epochs instead"
            )
        overrides.append(f"eval.detect.fraction={options.fraction}")
    if len(files) > 1:
        raise ConfigError(f"got {len(files)} configurations ({', '.join(files)}); give one")
    given = config_from_file(files[0]) if files else None
    overridden(given or Config(), overrides)  # a wrong option is refused before torch is loaded
    from pcd_ray.evaluate.ray_eval import config_for, evaluate

    config = overridden(config_for(students, given), overrides)
    summary: dict[str, Any] = evaluate(kind, students, config).summary()
    if not options.json:
        for long in ("scores", "classes", "about"):  # on the page, and in summary.json
            del summary[long]
    return summary


def _tune(options: argparse.Namespace) -> dict[str, Any]:
    config = _config(options.words)
    from pcd_ray.tune.ray_sweep import sweep

    summary: dict[str, Any] = sweep(config).summary()
    return summary


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from pcd_ray.inspection import inspect

    return inspect(_one(options.words, "inspect PATH"), verify=options.verify).summary()


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from pcd_ray.config import Config, is_override, overridden

    overrides = [word for word in options.words if is_override(word)]
    run = _one([word for word in options.words if word not in overrides], "export RUN")
    for word in overrides:
        if not word.startswith("export."):
            raise ConfigError(
                f"{word!r} is none of export.*; a trained run's other options are settled: drop it"
            )
    overridden(Config(), overrides)  # a wrong option is refused before a checkpoint is read
    from pcd_ray.checkpoint import find_checkpoint
    from pcd_ray.export import export_checkpoint
    from pcd_ray.storage import absolute

    stored = find_checkpoint(absolute(run))
    result = export_checkpoint(stored, overridden(stored.config, overrides).export)
    return result.summary() if options.json else result.overview()


_VERBS: tuple[tuple[str, str, Callable[[argparse.Namespace], dict[str, Any]], str], ...] = (
    ("demo", "[CONFIG.yaml]", _demo, "See a student become good at pixels, offline, in minutes."),
    ("pack", "[CONFIG.yaml]", _pack, "Turn images into shards: data.sources -> data.shards."),
    ("train", "CONFIG.yaml", _train, "Distil a student, or go on where the run stopped."),
    ("tune", "CONFIG.yaml", _tune, "Search tune.space on the cluster; the best config as a file."),
    (
        "eval",
        "{knn,linear,segment,detect} STUDENT [CONFIG.yaml]",
        _eval,
        "Judge students side by side: runs, files, timm names, untrained, teacher.",
    ),
    ("inspect", "PATH", _inspect, "Say what a folder, shards, a weights file or a run is."),
    ("export", "RUN", _export, "Write the student's backbone as safetensors, for timm."),
)


def _config(words: Sequence[str]) -> Any:
    from pcd_ray.config import config_from_argv

    return config_from_argv(["pcd-ray", *words])


def _one(words: Sequence[str], form: str) -> str:
    if len(words) != 1:
        raise PcdError(f"got {len(words)} arguments; the form is: pcd-ray {form}")
    if not words[0]:
        raise PcdError(f"got an empty path; the form is: pcd-ray {form}")
    return words[0]


def _print_table(summary: dict[str, Any], prefix: str = "") -> None:
    """Print scores as a table of networks, everything else as aligned lines, one value each."""
    scores = {name: value for name, value in summary.items() if _is_scores(value)}
    if scores:
        print(f"{'':<24}" + "".join(f"{name:>12}" for name in next(iter(scores.values()))))
        for name, value in scores.items():
            print(f"{name:<24}" + "".join(f"{score:>12.1f}" for score in value.values()))
        print()
    tables = {name: value for name, value in summary.items() if _is_table(value)}
    for table in tables.values():
        _print_columns(table)
    summary = {k: v for k, v in summary.items() if k not in scores and k not in tables}
    rows = list(_rows(summary, prefix))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        if "\n" in value:  # lines to be copied
            print(f"\n{value}")
            continue
        lines = textwrap.wrap(value, _LINE, break_long_words=False, break_on_hyphens=False) or [""]
        print(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))


_RAYS = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [DIWE] \d+ \d+\] (\(\S+\) )?\w+\.cc:\d+: ")
_LAST_LINES_S = 2.0
_LINE = 100  # characters of a value on one line of a table
_NETWORKS = ("untrained", "student", "teacher")


def _is_scores(value: object) -> bool:
    return isinstance(value, dict) and tuple(value)[:3] == _NETWORKS


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _print_columns(table: Sequence[dict[str, Any]]) -> None:
    header = list(table[0])
    lines = [header, *([str(row[name]) for name in header] for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for first, *others in lines:
        padded = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([f"{first:<{widths[0]}}", *padded]))
    print()


def _rows(summary: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in summary.items():
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{prefix}{name}.")
        elif value in (None, "", {}, []):
            continue  # nothing to say; --json has it
        elif isinstance(value, float):
            rows.append((prefix + name, f"{value:.4g}"))
        else:
            rows.append((prefix + name, str(value)))
    return rows
