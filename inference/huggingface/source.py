"""The network's source as one file that needs torch alone: `network_source`.

A folder that leaves the repository cannot import model.py, which imports layers/, common/, and by
them the checks of config.py and the tokenizers. So what `build_model` uses is cut out of these
files: each top-level definition that it leads to, with its comments, as it stands. Only imports of
our own files go, and `variants.X` becomes `X`. Of `Config` there remain the properties."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOTS = [("model", "build_model"), ("layers.state", "State")]  # what the exported model imports

# The modules whose functions need the C++ or Triton's kernels, which are not exported, and what
# stands for each of these functions. What they give, None, is what they say where there are none.
LEFT_OUT = ("layers.passes", "layers.delta_rule")
STAND_IN = '''def {}(*inputs) -> None:
    """Nothing: the C++ and the kernels of the repository are not here."""'''

CONFIG = '''class Config(SimpleNamespace):
    """The keys that shape the network, as in the config.json of the run that it is from."""

    def model_copy(self, update: dict) -> "Config":
        return Config(**(vars(self) | update))
'''

DOCSTRING = '''"""The network of an exported WaveletLM: model.py and what it uses,
cut out of the files of its repository by export.py. Apache-2.0, see LICENSE.

{}
"""
'''


class Module:
    """A file of ours: its top-level statements, and where the names that it imports are from."""

    def __init__(self, name: str):
        self.name = name
        text = path_of(name).read_bytes()
        self.tree = ast.parse(text)
        self.lines = text.splitlines()  # bytes, as ast counts columns
        self.statements: dict[str, int] = {}  # a defined name -> its place in the file
        self.ours: dict[str, tuple[str, str | None]] = {}  # an imported name -> module, name there
        self.packages: dict[str, ast.stmt] = {}  # a name of a package's -> an import of it alone
        for place, statement in enumerate(self.tree.body):
            for defined in names_defined(statement):
                self.statements[defined] = place
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.note_import(statement)

    def note_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            local = alias.asname or alias.name
            if isinstance(statement, ast.Import):
                self.packages[local.partition(".")[0]] = ast.Import([alias])
            elif path_of(statement.module).is_file():
                self.ours[local] = (statement.module, alias.name)
            elif path_of(f"{statement.module}.{alias.name}").is_file():
                self.ours[local] = (f"{statement.module}.{alias.name}", None)
            else:
                self.packages[local] = ast.ImportFrom(statement.module, [alias], 0)

    def uses(self, name: str) -> set[tuple[str, str]]:
        """The definitions of ours, as module and name, that the one of `name` refers to."""
        found = set()
        for node in ast.walk(self.tree.body[self.statements[name]]):
            if isinstance(node, ast.Attribute) and (inner := self.of_module(node)):
                found.add(inner)
            if not isinstance(node, ast.Name):
                continue
            if node.id in self.statements:
                found.add((self.name, node.id))
            elif node.id in self.ours and self.ours[node.id][1] is not None:
                found.add(self.ours[node.id])
        return found

    def of_module(self, node: ast.Attribute) -> tuple[str, str] | None:
        """What `variants.X` names, where `variants` is an imported file of ours."""
        if not isinstance(node.value, ast.Name):
            return None
        module, name = self.ours.get(node.value.id, (None, "none"))
        return (module, node.attr) if name is None else None

    def cut(self, place: int) -> str:
        """The statement at `place` with the comments before it, and `variants.X` as `X`."""
        statement = self.tree.body[place]
        lines = self.lines[: statement.end_lineno]
        nodes = [n for n in ast.walk(statement) if isinstance(n, ast.Attribute)]
        # from the right to the left, so that the columns of those to come stay what they are
        for node in sorted(nodes, key=lambda n: -n.col_offset):
            if self.of_module(node):
                line = lines[node.lineno - 1]
                after = line[node.end_col_offset :]
                lines[node.lineno - 1] = line[: node.col_offset] + node.attr.encode() + after
        before = self.tree.body[place - 1].end_lineno if place else 0
        return b"\n".join(lines[before:]).decode().strip("\n")


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def names_defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = {ast.Assign: "targets", ast.AnnAssign: "target"}.get(type(statement))
    if targets is None:
        return []
    assigned = getattr(statement, targets)
    trees = assigned if isinstance(assigned, list) else [assigned]
    return [n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)]


def needed() -> tuple[list[Module], dict[str, set[str]]]:
    """The modules that the network is in, each behind those that it imports from, and of each (and
    of those that are left out) the names of the definitions that are used."""
    modules: dict[str, Module] = {}
    names: dict[str, set[str]] = {}
    waiting = list(ROOTS)
    while waiting:
        module, name = waiting.pop()
        if (module, name) == ("config", "Config") or name in names.setdefault(module, set()):
            continue
        names[module].add(name)
        if module in LEFT_OUT:
            continue
        if module not in modules:
            modules[module] = Module(module)
        waiting += modules[module].uses(name)
    ordered: list[Module] = []

    def put(module: Module) -> None:
        for below, _ in module.ours.values():
            if below in modules and modules[below] not in ordered:
                put(modules[below])
        if module not in ordered:
            ordered.append(module)

    for module in modules.values():
        put(module)
    return ordered, names


def config_source() -> str:
    """`Config` without pydantic: its properties and plain methods, on values that were checked when
    the run began."""
    module = Module("config")
    config = module.tree.body[module.statements["Config"]]
    parts = [CONFIG]
    helpers: set[int] = set()  # the functions of config.py that those methods call
    for node in config.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        if [ast.unparse(each) for each in node.decorator_list] not in ([], ["property"]):
            continue
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        parts.append(b"\n".join(module.lines[first - 1 : node.end_lineno]).decode() + "\n")
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        helpers |= {
            module.statements[name] for name in (names - {"Config"}) & module.statements.keys()
        }
    functions = [module.cut(place) for place in sorted(helpers)]
    text = "\n".join(parts).rstrip("\n")
    return "\n\n\n".join([*functions, text])


def imports_of(text: str, modules: list[Module]) -> str:
    """The imports of packages whose names `text` uses."""
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    packages = {name: node for module in modules for name, node in module.packages.items()}
    lines = {ast.unparse(packages[name]) for name in packages.keys() & used}
    return "\n".join(sorted({*lines, "from types import SimpleNamespace"}))


@functools.cache
def network_source() -> str:
    """The text of the one file. Raises `ValueError` where two files define the same name."""
    modules, names = needed()
    without = sorted(name for module in LEFT_OUT for name in names[module])
    parts = [config_source(), *map(STAND_IN.format, without)]
    seen: dict[str, str] = {"Config": "config"}
    for module in modules:
        parts.append(f"# {'=' * 40} {module.name.replace('.', '/')}.py")
        for place in sorted({module.statements[name] for name in names[module.name]}):
            parts.append(module.cut(place))
        for name in names[module.name]:
            if seen.setdefault(name, module.name) != module.name:
                raise ValueError(f"{name}: {seen[name]} and {module.name} both define it")
    text = "\n\n\n".join(parts) + "\n"
    docstring = DOCSTRING.format(ast.get_docstring(Module("model").tree))
    return f"{docstring}\n{imports_of(text, modules)}\n\n\n{text}"
