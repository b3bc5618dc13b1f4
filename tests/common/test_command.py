"""Whatever a user gives, a command does its work (exit code 0) or says in one line what is wrong
(exit code 2): no traceback, no hang, no death without a word. Values, command lines and damaged
files are drawn at random; each command runs in a forked child, with a limit on its time and its
memory."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import generate
import quantize
import train
from common.command import InputError, Parser, explain, one_line, run_command
from config import Config, make_config
from inference.sampling import draw
from research import curves, probes
from research import inspection as inspect_model

SECONDS = 60  # of processor time that a command may take: each takes about one
ASLEEP = 10  # seconds that it may wait for something other than the processor
# bytes that a command may ask for beyond what Python and torch have: a machine's memory is not for
# tests
MEMORY = 8 * 2**30
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 8))
FUZZ = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


class Outcome(NamedTuple):
    # "signal N" where it was killed: 9 while it waited for something, 24 for its time
    code: int | str
    out: str
    err: str


def run(
    main: Callable[[], None],
    arguments: list[str],
    folder: Path,
    prepare: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a command's `main` with `arguments` in a forked child, in `folder`, after `prepare()` in
    the child."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = run_writing(main, arguments, folder, prepare, (out.fileno(), err.fileno()))
        texts = [
            Path(f"/proc/self/fd/{file.fileno()}").read_text(errors="replace")
            for file in (out, err)
        ]
    return Outcome(code if code >= 0 else f"signal {-code}", *texts)


def run_writing(
    main: Callable, arguments: list[str], folder: Path, prepare: Callable, outputs: tuple[int, int]
) -> int:
    """Does so with stdout and stderr in the files `outputs`, and returns the exit code, negative
    for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, file in enumerate(outputs, 1):
                os.dup2(file, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(
                resource.RLIMIT_CPU, (used := int(time.process_time()) + SECONDS, used)
            )
            os.chdir(folder)
            sys.argv = ["command", *arguments]
            prepare()
            run_command(main)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    asleep = 0.0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.02)
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        # what waits for the processor is no hang, whatever the clock says
        asleep = asleep + 0.02 if state == "S" else 0.0
        if asleep > ASLEEP:
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[1])


def assert_done_or_said(outcome: Outcome) -> None:
    """Exit code 0, or 2 and one line that says why, as the last thing on stderr."""
    assert outcome.code in (0, 2), outcome
    assert "Traceback" not in outcome.err, outcome
    if outcome.code == 2:
        *before, last = outcome.err.splitlines()
        assert last.startswith("error: ") and len(last) > 12, outcome
        assert not any(line.startswith("error: ") for line in before), outcome


TEXT = "".join(f"Line {i}: the bear met a fox, and {7 * i} hens.\n" for i in range(400))
# A run of two steps, which ends in a second.
RUN = TINY | {
    "layers": 1, "per_scale_mixer_widths": None, "dataset": "text.txt", "tokenizer": "bytes",
    "compile": False, "use_amp": False,
    "max_steps": 2, "micro_batch_size": 2, "eval_interval": 2, "save_interval": 1,
    "log_interval": 1, "eval_tokens": 64,
    "sample_tokens": 4, "num_new_tokens": 4,
}  # fmt: skip
VALUES: list[Any] = [
    0, -1, 1, 2, 3, 5, 7, 64, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-320, 1e-45, 1e-9, 1e6, 1e30,
    1e308, "", "a", "$x$",
    "\0", "\udcff", "x" * 300, "/dev/zero", "fifo", "/", "..", ".", "text.txt", [], [0], [1, 2],
    [0.5, 0.5], [0.9, 0.05, 0.05],
    [[[]]], {}, {"": 1}, {"text.txt": 1}, {"a": -1}, None, True, False, [1e308] * 4, ["haar"] * 3,
]  # fmt: skip


def allowed(key: str, value: Any) -> bool:
    try:
        make_config(RUN | {key: value}, "x")
    except InputError:
        return False
    return True


CHANGES = [(key, value) for key in Config.model_fields for value in VALUES]
# hours, and no fault
CHANGES = [(key, value) for key, value in CHANGES if key != "max_steps" or value != 2**31]
ALLOWED = [(key, value) for key, value in CHANGES if allowed(key, value)]
TEXTS = [
    value if isinstance(value, str) else json.dumps(value)
    for value in VALUES
    if value not in ("\0", "\udcff")
]
TEXTS += ["nan", "-inf", "1e400", "9" * 5000, "[" * 2000, "\n", "train", "cuda", "folder"]
COMMANDS = {
    "train": (train.main, ["--config", "run.json"]),
    "resume": (train.main, ["--resume", "folder"]),
    "init_from": (train.main, ["--init_from", "folder", "--max_steps", "2"]),
    "generate": (generate.main, ["--checkpoint", "folder", "--num_tokens", "3"]),
    "evaluate": (evaluate.main, ["--checkpoint", "folder"]),
    "quantize": (quantize.main, ["--checkpoint", "folder", "--bits", "8", "--out", "new"]),
    "probes": (probes.main, ["--checkpoint", "folder", "--windows", "4"]),
    "inspect": (inspect_model.main, ["--checkpoint", "folder", "--tokens", "64"]),
    "curves": (curves.main, ["folder"]),
}


class Parsed(Exception):
    """Carries a command's options out of it."""


def options_of(main: Callable[[], None]) -> list[str]:
    """The options of a command, of which --help and those that make it long are left out."""

    def caught(self, *_):
        raise Parsed(list(self._option_string_actions))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(Parser, "parse_args", caught)
        main()
    names = set(parsed.value.args[0]) - {
        "-h",
        "--help",
        "--steps",
        "--interactive",
        "--compile",
    }
    return sorted(
        name for name in names if name[2:] not in Config.model_fields or main is not train.main
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a config, and a finished run called `folder`. This process trains it,
    so that the children that are forked from it find imported what training imports late."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(TEXT)
    (place / "run.json").write_text(json.dumps(RUN))
    os.mkfifo(place / "fifo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["train.py", "--config", "run.json"])
        train.main()
    next((place / "logs").iterdir()).rename(place / "folder")
    (place / "logs").rmdir()
    return place


@pytest.fixture
def copy(place, tmp_path) -> Callable[[], Path]:
    """Makes a fresh copy of `place` to be damaged."""

    def make() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(place, tmp_path / "copy", ignore=shutil.ignore_patterns("fifo"))
        os.mkfifo(tmp_path / "copy" / "fifo")
        return tmp_path / "copy"

    return make


def left_by_failed_starts(folder: Path) -> list[Path]:
    return [path for path in folder.glob("logs/*") if not (path / "latest.pt").exists()]


@FUZZ
@given(
    st.lists(st.one_of(st.sampled_from(ALLOWED), st.sampled_from(CHANGES)), min_size=1, max_size=2)
)
def test_whatever_a_config_says_training_ends_well_or_in_one_line(copy, changes):
    folder = copy()
    (folder / "run.json").write_text(json.dumps(RUN | dict(changes)))
    outcome = run(train.main, ["--config", "run.json"], folder)
    assert_done_or_said(outcome)
    assert not left_by_failed_starts(folder), outcome


@FUZZ
@given(st.data())
def test_whatever_a_command_line_says_a_command_ends_well_or_in_one_line(copy, data):
    main, arguments = COMMANDS[data.draw(st.sampled_from(list(COMMANDS)))]
    arguments = arguments[:]
    for name in data.draw(st.lists(st.sampled_from(options_of(main)), min_size=1, max_size=2)):
        arguments += [name, data.draw(st.sampled_from(TEXTS))]
    assert_done_or_said(run(main, arguments, copy()))


def damage(path: Path, how: str, at: float) -> None:
    """Spoils a file: `at`, from 0 to 1, is where, and by what."""
    content = path.read_bytes() if path.is_file() else b""
    position = int(at * max(len(content) - 1, 0))
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:position])
    elif how == "changed":
        path.write_bytes(
            content[:position] + bytes([int(at * 9973) % 256]) * 3 + content[position + 3 :]
        )
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how != "missing":
        path.write_text(
            {
                "deep": "[" * 100_000,
                "long": f'{{"C": {"9" * 5000}}}',
                "list": "[1]",
                "binary": "\0\udcff",
            }[how],
            errors="surrogateescape",
        )


WAYS = [
    "cut",
    "cut",
    "changed",
    "changed",
    "fifo",
    "folder",
    "device",
    "dangling",
    "missing",
    "deep",
    "long",
    "list",
    "binary",
]


@FUZZ
@given(st.data())
def test_whatever_happened_to_a_file_a_command_ends_well_or_in_one_line(copy, data):
    folder = copy()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    victim = data.draw(st.sampled_from(files))
    damage(victim, data.draw(st.sampled_from(WAYS)), data.draw(st.floats(0, 1)))
    main, arguments = COMMANDS[data.draw(st.sampled_from(list(COMMANDS)))]
    assert_done_or_said(run(main, arguments, folder))


# The causes that such draws meet seldom, one by one


@pytest.mark.parametrize("name", ["env.json", "generations.txt", "latest.pt"])
@pytest.mark.parametrize("command", ["resume", "generate"])
def test_no_file_of_a_run_is_waited_for(copy, name, command):
    folder = copy()
    (folder / "folder" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "folder" / name)
    main, arguments = COMMANDS[command]
    assert_done_or_said(run(main, arguments, folder))


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EIO]
)
def test_what_the_system_refuses_is_said_with_the_file_and_the_reason(number):
    line = explain(OSError(number, os.strerror(number), "logs/some.txt"))
    assert "logs/some.txt" in line and os.strerror(number) in line


def test_a_lack_of_memory_is_told_from_other_errors():
    for allocate in (
        lambda: torch.empty(2**60),
        lambda: torch.empty(2**31, 2**31, 2**31),
        lambda: np.empty(2**50),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert explain(caught.value).startswith("out of memory")
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_fault_of_the_program_keeps_its_traceback(place):
    outcome = run(lambda: {}["no such key"], [], place)
    assert outcome.code == 1 and "KeyError" in outcome.err


def test_an_errors_line_is_one_line_of_plain_characters():
    assert one_line("a\nb\x1b[31m\u2028c") == "a\\nb\\x1b[31m\\u2028c"
    assert len(one_line("9" * 10**6)) < 2000


def test_a_full_disk_is_said_in_one_line_and_leaves_no_half_file(copy):
    folder = copy()

    def full() -> None:
        # more than a token file has here, less than the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    outcome = run(train.main, ["--config", "run.json"], folder, full)
    assert outcome.code == 2, outcome
    assert_done_or_said(outcome)
    assert (
        not list(folder.glob("logs/*/.*"))
        and "error: logs/" in outcome.err
        and "cannot be written" in outcome.err
    )


def test_an_output_that_takes_nothing_is_said_in_one_line(place):
    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    outcome = run(generate.main, COMMANDS["generate"][1], place, full)
    assert outcome.code == 2, outcome
    assert_done_or_said(outcome)


def another_user() -> None:
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_place_that_may_not_be_written_is_named(copy):
    folder = copy()
    for path in [folder, *folder.parents]:
        if path.stat().st_mode & 0o055 != 0o055:  # pytest's own folders are for their owner alone
            path.chmod(0o755)
    for name in ("text.txt", "run.json"):
        (folder / name).chmod(0o644)  # the other user may read, whatever this one's umask is
    outcome = run(train.main, ["--config", "run.json", "--cache_dir", "/tmp"], folder, another_user)
    assert outcome.code == 2 and "logs" in outcome.err, outcome
    assert_done_or_said(outcome)


def test_training_needs_no_git_and_takes_dollars_in_names_for_dollars(copy):
    folder = copy()
    (folder / "text.txt").rename(folder / "a$\\frac$b$.txt")
    arguments = ["--config", "run.json", "--dataset", "a$\\frac$b$.txt"]
    outcome = run(train.main, arguments, folder, lambda: os.environ.update(PATH="/nowhere"))
    assert outcome.code == 0, outcome
    made = next(folder.glob("logs/*"))
    assert (
        made.name.startswith("a$\\frac$b$")
        and json.loads((made / "env.json").read_text())["commit"] is None
    )
    outcome = run(curves.main, [str(made)], folder)
    assert outcome.code == 0, outcome


def test_training_needs_no_module_that_windows_lacks(place, copy):
    def without() -> None:
        sys.modules.update(resource=None, fcntl=None)
        for name in [
            name
            for name, module in sys.modules.items()
            if getattr(module, "__file__", None) and ours(module)
        ]:
            del sys.modules[name]

    def ours(module) -> bool:
        return ROOT in Path(module.__file__).parents and ".venv" not in Path(module.__file__).parts

    def main() -> None:
        import train

        train.main()

    outcome = run(main, ["--config", "run.json"], copy(), without)
    assert outcome.code == 0 and "steps: 2" in outcome.out and "peak_memory" not in outcome.out, (
        outcome
    )


@pytest.mark.parametrize(
    "values",
    [{"WORLD_SIZE": text} for text in ("", "two", "0", "-1", "9" * 20)]
    + [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "5"}],
)
def test_a_number_of_processes_that_is_none_is_said_in_one_line(place, values):
    outcome = run(train.main, ["--config", "run.json"], place, lambda: os.environ.update(values))
    assert outcome.code == 2 and any(name in outcome.err for name in ("WORLD_SIZE", "RANK")), (
        outcome
    )
    assert_done_or_said(outcome)


def test_a_fault_is_blamed_on_where_it_is(place):
    blamed = run(train.main, ["--config", "run.json", "--lr", "abc"], place).err
    assert "error: lr: " in blamed and "run.json" not in blamed
    # below min_lr
    blamed = run(train.main, ["--config", "run.json", "--lr", "1e-9", "--seed", "5"], place).err
    assert "run.json with --lr: min_lr: " in blamed
    assert (
        "dataset: " in run(train.main, ["--config", "run.json", "--dataset", "\udcff"], place).err
    )


def test_a_network_that_no_memory_holds_is_refused_before_it_is_made(place):
    outcome = run(
        train.main, ["--config", "run.json", "--C", str(2**17), "--block_size", "64"], place
    )
    assert outcome.code == 2 and "out of memory" in outcome.err, outcome
    assert_done_or_said(outcome)
    assert not left_by_failed_starts(place)


def test_advice_names_no_file_that_is_not_there(copy):
    folder = copy()
    arguments = [
        "--config",
        "run.json",
        "--lr",
        "1e6",
        "--min_lr",
        "1e6",
        "--optimizer",
        "SGD",
        "--max_steps",
        "40",
    ]
    outcome = run(
        train.main,
        [*arguments, "--save_interval", "40", "--eval_interval", "40", "--grad_clip", "0"],
        folder,
    )
    assert (
        outcome.code == 2 and "finite gradient" in outcome.err and "latest.pt" not in outcome.err
    ), outcome


@pytest.mark.parametrize("top_p", [1e-320, 1e-45, 1e-9])
def test_the_smallest_nucleus_is_the_most_probable_token(top_p):
    probs = torch.rand(4, 50).softmax(-1)
    drawn = draw(probs, torch.full((4, 1), top_p), torch.rand(4, 1, dtype=torch.float64))
    assert drawn.tolist() == probs.argmax(-1).tolist()


def test_a_damaged_table_is_blamed_itself(copy):
    folder = copy()
    (folder / "tables").mkdir()
    (folder / "tables" / "train.parquet").write_bytes(b"PAR1, and no more")
    outcome = run(train.main, ["--config", "run.json", "--dataset", "tables"], folder)
    assert outcome.code == 2 and "tables" in outcome.err and "hub" not in outcome.err.lower(), (
        outcome
    )
    assert len(outcome.err.splitlines()) == 1, outcome
    assert not left_by_failed_starts(folder)
