"""The layers of the source: a folder imports what lies below it, no circles, no large files."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import exfusion_param as exf

SOURCE = Path(exf.__file__).parent
TESTS = Path(__file__).parent
LAYERS = [
    ["atomic_files", "expert_config", "config"],
    ["tensors", "finding"],
    ["fusion_weights"],
    ["fusion"],
    ["step"],
    ["wrapping", "sharding"],
    ["measures", "optim", "state_dict", "history", "routing"],
    ["api", "checkpoint", "plotting"],
    ["summary", "integrations", "meo", "study"],
    ["cli"],
]
"""From the lowest up; what shares a layer is independent of each other, but for `config`."""

LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
    if path != SOURCE / "__init__.py"
}


def imports_of(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """The package's own modules that a module imports, each with the statement."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                names = [".".join([*base, alias.name]), ".".join(base)]
                if target := next((name for name in names if name in MODULES), None):
                    yield target, node


ARROWS = {module: {target for target, _ in imports_of(module)} for module in MODULES}


@pytest.mark.parametrize(("folder", "most"), [(SOURCE, 250), (TESTS, 350)], ids=["src", "tests"])
def test_files_are_small(folder: Path, most: int) -> None:
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py")
    }
    assert not {str(path): count for path, count in lines.items() if count > most}


def test_every_module_has_a_layer() -> None:
    assert {module.split(".")[0] for module in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("folder", LEVEL)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    upward = [
        f"{module} -> {target}"
        for module, targets in ARROWS.items()
        for target in targets
        if module.split(".")[0] == folder != target.split(".")[0]
        and LEVEL[target.split(".")[0]] >= LEVEL[folder]
        and (folder, target) != ("config", "expert_config")
    ]
    assert not upward


def circles(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when everything goes that points at nothing which is left."""
    left = {name: targets - {name} for name, targets in arrows.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return left


def test_no_files_form_a_circle() -> None:
    assert not circles(ARROWS)


def test_no_folders_form_a_circle() -> None:
    """Nested ones included; each file at the top of the package counts as a folder."""
    arrows: dict[str, set[str]] = {}
    for module, targets in ARROWS.items():
        arrows.setdefault(folder_of(module), set()).update(map(folder_of, targets))
    assert not circles(arrows)


def folder_of(module: str) -> str:
    is_folder = MODULES[module].name == "__init__.py"
    return module if is_folder else module.rpartition(".")[0] or module


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_functions_are_of_optional_packages(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    late = {node for f in functions for node in ast.walk(f) if _is_import(node)}
    own = {node: target for target, node in imports_of(module)}
    for node in late:
        names = [own[node]] if node in own else list(_outside(node))
        assert all(_is_optional(name) for name in names), ast.unparse(node)


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _outside(node: ast.AST) -> Iterator[str]:
    """The packages outside of this one that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        yield node.module


def _is_optional(name: str) -> bool:
    """Whether a module can be missing, or needs one that can; torch may lack its distributed."""
    if name in MODULES:
        files = [path for other, path in MODULES.items() if f"{other}.".startswith(f"{name}.")]
        nodes = (node for file in files for node in ast.parse(file.read_text()).body)
        return any(_is_optional(package) for node in nodes for package in _outside(node))
    top = name.split(".")[0]
    if top == "torch":
        return name.startswith("torch.distributed")
    return top not in sys.stdlib_module_names
