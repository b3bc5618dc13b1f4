"""What the README says is there, and its commands are commands."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from config import options_table

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.startswith("python ")]


def test_files_and_links_that_the_readme_names_exist():
    named = re.findall(r"`([\w-]+\.(?:py|json|md))`", README) + re.findall(r"\]\(((?!http)[^)]+)\)", README)
    made_by_runs = {"config.json", "data.json", "env.json"}
    missing = [name for name in named if not (REPO / name).exists() and name not in made_by_runs]
    assert not missing


@pytest.mark.parametrize("script", sorted({command[1] for command in COMMANDS}))
def test_options_in_the_readme_are_options_of_the_command(script, monkeypatch, capsys):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    used = {word for command in COMMANDS if command[1] == script for word in command if word.startswith("--")}
    assert used <= known


def test_the_two_commands_stand_alone_and_ci_runs_them():
    ci = (REPO / ".ci/run").read_text(encoding="utf-8")
    for name in ("quickstart", "tests"):
        command = README.split(f"<!-- command: {name} -->\n```bash\n")[1].split("\n```")[0]
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
        assert f"command_of {name}" in ci


def test_the_table_of_options_is_that_of_the_config():
    """Made again by: python config.py."""
    table = README.split("<!-- options: made by python config.py -->\n")[1].split("<!-- end of options -->")[0]
    assert table.strip() == options_table().strip()
