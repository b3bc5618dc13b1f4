"""What lies on what: modules know those of the floors below their own, and importing one does
nothing else; tests are in the wing that they test, and know none of each other."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT

# From the lowest floor up. A name is a folder's (a wing) or a file's at the top.
FLOORS = [
    {"common"}, {"config"}, {"data"}, {"layers"}, {"model"}, {"inference"}, {"checkpoint"},
    {"training"}, {"train", "generate", "evaluate", "quantize", "export"}, {"research"},
]  # fmt: skip
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# training reaches what inference makes by way of checkpoint alone
STRANGERS = {("training", "inference")}
NOT_OURS = {"tests", "logs"}


def modules() -> dict[str, Path]:
    """Every module of ours by its name, `data.order` and the like; a wing's own is `data`."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    places = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): path
        for parts, path in zip(places, paths, strict=True)
        if parts[0] not in NOT_OURS and not parts[0].startswith(".")
    }


MODULES = modules()
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path)


def names_imported(path: Path) -> set[str]:
    """Full names that a file imports anywhere in it, in functions too: `data.order` and
    `data.order.Windows` for `from data.order import Windows`."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which wing it reaches"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {name: names_imported(path) & (MODULES.keys() - {name}) for name, path in MODULES.items()}


def wing(module: str) -> str:
    return module.partition(".")[0]


def imports_between_wings() -> Iterator[tuple[str, str]]:
    for module, imported in IMPORTS.items():
        yield from ((module, other) for other in imported if wing(other) != wing(module))


def test_every_module_has_a_floor_and_every_floor_a_module():
    assert {wing(module) for module in MODULES} <= FLOOR_OF.keys()
    found = {FLOOR_OF[wing(module)] for module in MODULES}
    assert found == set(range(len(FLOORS)))


def test_no_module_knows_one_of_its_own_floor_in_another_wing_or_of_a_floor_above():
    wrong = [
        f"{module} imports {other}"
        for module, other in imports_between_wings()
        if FLOOR_OF[wing(other)] >= FLOOR_OF[wing(module)]
    ]
    assert not wrong


def test_training_and_inference_do_not_know_each_other():
    assert not [
        f"{module} imports {other}"
        for module, other in imports_between_wings()
        if {(wing(module), wing(other)), (wing(other), wing(module))} & STRANGERS
    ]


def test_modules_import_in_no_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises a CycleError that names the circle


# ===== What an import does


def statements_run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that are no definitions, without those of its main program."""
    for statement in body:
        if isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test):
            continue
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from statements_run_at_import(statement.body)
            yield from statements_run_at_import(getattr(statement, "orelse", []))
        else:
            yield statement


def test_no_module_calls_something_for_its_effect_when_it_is_imported():
    called = [
        f"{module}, line {statement.lineno}: {ast.unparse(statement)}"
        for module, path in MODULES.items()
        for statement in statements_run_at_import(tree(path).body)
        if isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
    ]
    assert not called


# What a fresh process can see of an import: files it writes, processes it starts, addresses it
# calls, and what torch and Python have only one of. torch itself is imported before the watch
# begins.
IMPORT_ALL = """
import importlib
import os
import signal
import sys
import threading

import torch
import filelock  # some versions of it, and torch 2.9 with the next line, write a file
import torch.distributed.nn

DONE = []


def watch(event, arguments):
    written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if written or event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen",
                            "socket.connect"):
        DONE.append((event, *map(str, arguments)))


def seen():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "running": threading.active_count(),
        "type": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().sum().item(),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "folder": os.getcwd(),
    }


sys.addaudithook(watch)
for name in sys.argv[1:]:
    before = seen()
    importlib.import_module(name)
    changed = [key for key, value in seen().items() if value != before[key]]
    if changed or DONE:
        print(name, changed, DONE)
        DONE.clear()
"""


def test_importing_every_module_changes_nothing_and_writes_nothing(tmp_path):
    """A process of its own, since this one has imported them all."""
    # lm_eval_adapter imports lm_eval, which is another project's, and need not be installed
    names = sorted(MODULES.keys() - {"research.lm_eval_adapter"})
    clean = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        cwd=tmp_path, env=os.environ | clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert not list(tmp_path.iterdir())


# ===== Where tests lie


def test_tests_lie_in_a_folder_of_the_wing_that_they_test():
    wings = {name for name in FLOOR_OF if (ROOT / name).is_dir()}
    folders = {path.parent.name for path in TESTS if path.name.startswith("test_")}
    assert folders == wings | {"tests"}


def test_no_test_file_knows_another_than_helpers_and_cases():
    others = {path.stem for path in TESTS} - {"helpers", "cases"}
    assert not [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in TESTS
        for name in names_imported(path)
        if name.rpartition(".")[2] in others
    ]


def test_the_checks_of_imports_see_an_import_within_a_function(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from data.order import Windows\n    import model as m\n")
    assert names_imported(path) == {"data.order", "data.order.Windows", "model"}
