"""The layers of the library, read off its source: an import only points down."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import interpreters
import pytest

PACKAGE = interpreters.SOURCE / "lguestlib"

LAYERS = ("abi", "memory", "virtio", "runtime", "cli")
"""From the bottom up; the launcher's modules beside the packages are the top one."""

KERNEL_AND_THREADS = {
    "os",
    "threading",
    "select",
    "socket",
    "ctypes",
    "fcntl",
    "mmap",
    "signal",
    "termios",
    "subprocess",
}


class Import(NamedTuple):
    """A module that *file* imports at *line*, by its full name."""

    file: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


def layer(path: Path) -> int:
    """The number of the layer that a file or module path relative to the package is in."""
    name = path.parts[0].removesuffix(".py") if path.parts else ""
    return LAYERS.index(name) if name in LAYERS[:-1] else len(LAYERS) - 1


def resolved(file: Path, node: ast.ImportFrom) -> list[str]:
    """The modules, or names of modules, that a `from` imports."""
    base = node.module or ""
    if node.level:
        parents = ["lguestlib", *file.relative_to(PACKAGE).parts[: -node.level]]
        base = ".".join([*parents, base] if base else parents)
    return [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]


def is_module(name: str) -> bool:
    """Whether the library has a module or package of that full name."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("lguestlib") and (path.is_dir() or path.with_suffix(".py").is_file())


@cache
def imports() -> tuple[Import, ...]:
    """Every import in the library: at the top, inside functions, and for type checkers only."""
    found = []
    for file in files():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = resolved(file, node)
            found += [Import(file, node.lineno, name) for name in names if isinstance(node, ast.stmt)]
    return tuple(found)


def inside(name: str) -> Iterator[Import]:
    """The imports of a layer."""
    return (each for each in imports() if each.file.is_relative_to(PACKAGE / name))


def test_the_whole_library_is_looked_at() -> None:
    assert len(files()) > 50 and len(imports()) > 200
    assert {LAYERS[layer(file.relative_to(PACKAGE))] for file in files()} == set(LAYERS)


def test_an_import_points_down() -> None:
    wrong = []
    for each in imports():
        if each.module.split(".")[0] == "lguestlib":
            target = Path(*each.module.split(".")[1:])
            if layer(target) > layer(each.file.relative_to(PACKAGE)):
                wrong.append(str(each))
    assert wrong == []


def test_a_layer_imports_another_by_its_modules_and_not_through_the_package() -> None:
    assert [
        str(each) for each in imports() if each.module == "lguestlib" and each.file.parent != PACKAGE
    ] == []


def test_nothing_but_the_standard_library_is_imported() -> None:
    allowed = sys.stdlib_module_names | {"lguestlib", "_ctypes"}
    assert [str(each) for each in imports() if each.module.split(".")[0] not in allowed] == []


def test_virtio_knows_no_thread_file_descriptor_or_socket() -> None:
    wrong = [str(each) for each in inside("virtio") if each.module.split(".")[0] in KERNEL_AND_THREADS]
    assert wrong == []
    assert any(True for _ in inside("virtio"))


def test_nothing_is_imported_by_a_computed_name() -> None:
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("__import__", "importlib.import_module"), (
                    file,
                    node.lineno,
                )


PUBLISHED_LATER = {
    ("runtime/backend/uring.py", "_add", "self._entries"),
    ("virtio/split_driver.py", "_write", "table"),
    ("virtio/split_driver.py", "add", "self._descriptors"),
}
"""Where `pack_into` is right: the function, and its target, descriptors or entries that no index announces yet."""


class PackInto(ast.NodeVisitor):
    """Finds every mention of `pack_into`: the function it is in, and what it writes to."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._function = ""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = outer

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "pack_into":
            self.found.append((self._function, ast.unparse(node.args[0])))
            for argument in node.args:
                self.visit(argument)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "pack_into":
            self.found.append((self._function, "kept for later"))
        self.generic_visit(node)


def test_y1_pack_into_is_used_on_nothing_that_another_reads() -> None:
    found = set()
    for file in files():
        visitor = PackInto()
        visitor.visit(ast.parse(file.read_text()))
        found |= {(file.relative_to(PACKAGE).as_posix(), *mention) for mention in visitor.found}
    assert found == PUBLISHED_LATER


def test_y1_a_hidden_pack_into_would_be_found() -> None:
    visitor = PackInto()
    visitor.visit(ast.parse("store = S.pack_into\ndef f(ring):\n    S.pack_into(ring[0], 0, S.pack_into)"))
    assert visitor.found == [("", "kept for later"), ("f", "ring[0]"), ("f", "kept for later")]


def test_y1_the_rings_live_fields_are_views_of_whole_words() -> None:
    """In the two queue classes every field but the descriptors is made by a cast."""
    fields = {
        "_avail_flags",
        "_avail_idx",
        "_avail_ring",
        "_used_event",
        "_used_flags",
        "_used_idx",
        "_used_ring",
        "_avail_event",
    }
    for name in ("split_device.py", "split_driver.py"):
        tree = ast.parse((PACKAGE / "virtio" / name).read_text())
        made: dict[str, str] = {}
        local: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = ast.unparse(node.targets[0])
                (made if target.removeprefix("self.") in fields else local)[target] = ast.unparse(node.value)
        assert {target.removeprefix("self.") for target in made} == fields
        for target, value in made.items():
            source = local.get(value.split("[")[0], "")
            assert "cast('H')" in value + source or "cast('I')" in value, (name, target)


NO_KERNEL = """
import ctypes, sys

def refuse(*arguments, **named):
    raise AssertionError("a library was loaded")

ctypes.CDLL = ctypes.PyDLL = refuse
import importlib, pkgutil
import lguestlib.memory, lguestlib.virtio
for package in (lguestlib.memory, lguestlib.virtio):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("lguestlib.")]))
"""


def test_memory_and_virtio_are_imported_without_a_call_to_the_kernel() -> None:
    count = interpreters.run([sys.executable], "-c", NO_KERNEL)
    assert int(count) > 30


@pytest.mark.parametrize("package", ["abi", "memory", "virtio"])
def test_a_lower_layer_loads_nothing_of_the_upper_ones(package: str) -> None:
    program = (
        "import importlib, pkgutil, sys, lguestlib.{0} as package\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*{{name.split('.')[1] for name in sys.modules if name.startswith('lguestlib.')}})"
    ).format(package)
    loaded = set(interpreters.run([sys.executable], "-c", program).split())
    assert loaded == set(LAYERS[: LAYERS.index(package) + 1])


FORKS = {"lguestlib/runtime/probe.py"}
"""`probe` has one thread, and looks in a child at what would change the process for good."""


def test_y8_nothing_forks() -> None:
    """A fork copies one thread and every lock: what the others held stays held for ever."""
    assert [str(each) for each in imports() if each.module.split(".")[0] == "multiprocessing"] == []
    forking = set()
    for file in files():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            name = node.attr if isinstance(node, ast.Attribute) else node.arg if isinstance(node, ast.keyword) else ""
            if name in ("fork", "forkpty", "preexec_fn"):
                forking.add(str(file.relative_to(PACKAGE.parent)))
    assert forking == FORKS
