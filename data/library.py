"""Python's own documentation as a corpus: reference topics, and docstrings of the standard library,
of the running Python, which are there without a network."""

import ast
import hashlib
import inspect
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path


def unit(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same split in every run and Python
    version."""
    # of the first 30 salts the one whose pydoc shares are nearest to 90, 5 and 5% of the bytes
    salted = f"19{key}"
    return int.from_bytes(hashlib.sha256(salted.encode()).digest()[:8], "big") / 2**64


def _share(unit: float) -> str:
    return "train" if unit < 0.9 else "validation" if unit < 0.95 else "test"


def library_files() -> list[Path]:
    """Paths of the standard library's modules, relative to it, sorted; tests are no
    documentation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path for path in files if not skipped & set(path.parts))


def library_documents(split: str) -> Iterator[tuple[bool, str]]:
    from pydoc_data.topics import topics  # half a megabyte that no other source needs

    for name in sorted(topics):
        if _share(unit(f"topic {name}")) == split:
            yield True, f"topic {name}\n\n{inspect.cleandoc(topics[name])}\n\n\n"
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in library_files():
        if _share(unit(path.as_posix())) != split:
            continue
        try:
            tree = ast.parse((root / path).read_bytes())
        except (SyntaxError, ValueError):
            # templates and samples of other versions: not Python, so they have no docstrings
            continue
        parts = path.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = "".join(_entries(tree, name))
        if text:
            # A docstring may hold half a surrogate pair, which no UTF-8 file can.
            yield True, text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _entries(node: ast.AST, name: str) -> Iterator[str]:
    """Yields heading and indented docstring of a module, class or function and of all inside it, in
    source order."""
    heading = ""
    if isinstance(node, ast.Module):
        heading = f"module {name}"
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        heading = f"class {name}({bases})" if bases else f"class {name}"
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        heading = f"{name}({ast.unparse(node.args)})"
    docstring = ast.get_docstring(node, clean=False) if heading else None
    if docstring and docstring.strip():
        yield f"{heading}\n{textwrap.indent(inspect.cleandoc(docstring), '    ')}\n\n"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # no expression defines a name
        inner = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        yield from _entries(child, f"{name}.{child.name}" if inner else name)
