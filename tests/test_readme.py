"""What the README and the pages of docs/ say is there, their links lead somewhere, and their
commands are commands."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from config import Config, options_table

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *GUIDES,
    ROOT / "runs.md",
    ROOT / "tests/fixtures/README.md",
    *sorted((ROOT / "plans").glob("*.md")),
]
MADE_BY_RUNS = {
    "config.json",
    "data.json",
    "env.json",
    "tokenizer.json",
    "inspection.md",
    "tracker.json",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's bash blocks that begin with `python`, each as words."""
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL)
        for line in block.splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [each[1:] if each[1] == "-m" else each for each in words]  # MODULE or SCRIPT.py at 1


COMMANDS = [command for page in GUIDES for command in commands(page)]


def anchors(page: Path) -> set[str]:
    """The names by which GitHub lets headings be linked: lower case, no punctuation, hyphens for
    spaces."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    broken = []
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text_of(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_files_that_a_page_names_exist(page):
    files = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|json|md))`", text_of(page))
    places = [ROOT, ROOT / "configs"]
    missing = [
        name
        for name in files
        if name not in MADE_BY_RUNS and not any((place / name).exists() for place in places)
    ]
    assert not missing


@pytest.mark.parametrize("script", sorted({command[1] for command in COMMANDS}))
def test_options_on_the_pages_are_options_of_the_command(script, monkeypatch, capsys):
    if script == "research.lm_eval_adapter":
        pytest.importorskip("lm_eval")  # whose command it is
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    used = {
        word
        for command in COMMANDS
        if command[1] == script
        for word in command
        if word.startswith("--")
    }
    assert used <= known


def test_config_files_in_commands_exist():
    files = [
        word.split("=")[-1] for command in COMMANDS for word in command if word.endswith(".json")
    ]
    assert not [name for name in files if not (ROOT / name).is_file()]


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.encode()) <= 8192


def test_the_two_commands_stand_alone_and_ci_runs_them():
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for name in ("quickstart", "tests"):
        command = README.split(f"<!-- command: {name} -->\n```bash\n")[1].split("\n```")[0]
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
        assert f"command_of {name}" in ci
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_the_table_of_options_is_that_of_the_config():
    """Made again by: python config.py."""
    page = text_of(ROOT / "docs/options.md")
    table = page.split("<!-- options: made by python config.py -->\n")[1].split(
        "<!-- end of options -->"
    )[0]
    assert table.strip() == options_table().strip()
    assert all(f"| `{key}` |" in table for key in Config.model_fields)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("layers", "integer, 1 to 4,096"),
        ("C", "integer, 2 or more"),
        ("top_p", "number, above 0, at most 1"),
        ("momentum", "number, 0 or more, below 1"),
        ("multinodal_bagged_eps", "number, -1 or more, at most 1"),
        ("compile", "`true`, `false`"),
        ("max_steps", "integer, 1 to 1,000,000,000,000 or `null`"),
        ("eval_context", "`stream`, `window`"),
        ("adam_betas", "list of 2 (number, 0 or more)"),
    ],
)
def test_the_table_says_what_a_key_may_be(key, values):
    row = next(line for line in options_table().splitlines() if line.startswith(f"| `{key}` |"))
    assert row.split(" | ")[2] == values


def test_sections_of_runs_that_are_quoted_are_there():
    """As in: [runs.md](../runs.md), "Recall with …". An ellipsis stands for anything; what was
    folded has its old heading."""
    runs = text_of(ROOT / "runs.md")
    index, *_ = runs.partition("\n## ")
    titles = re.findall(r"^## (.*)$", runs, re.MULTILINE) + re.findall(
        r'^\| "([^"]*)"', runs, re.MULTILINE
    )
    assert index
    lost = []
    for page in [*GUIDES, *sorted((ROOT / "plans").glob("*.md"))]:
        # Lines are filled, so a title may go over a line's end.
        flowing = re.sub(r"\s+", " ", text_of(page))
        for title in re.findall(r'\[runs\.md\]\([./]*runs\.md\), "([^"]+)"', flowing):
            wanted = re.escape(title).replace("…", ".*")
            if not any(re.match(wanted, line) for line in titles):
                lost.append((named(page), title))
    assert not lost
