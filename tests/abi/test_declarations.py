"""Every structure, request number and constant of `lguestlib.abi` is the kernel's, on x86-64 and on i386."""

import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import interpreters
import pytest

from abi import declarations, headers
from abi.declarations import Declarations
from abi.headers import Header, Question

MODULES = declarations.module_names()


@cache
def _by_i386() -> dict[str, Declarations]:
    """The declarations as a 32-bit interpreter has them."""
    return declarations.from_json(interpreters.run(interpreters.i386_or_skip(), declarations.__file__))


@cache
def _gcc_options(wide: bool) -> list[str]:
    """What makes gcc compile for x86-64, or for i386 against the same headers."""
    if platform.machine() != "x86_64":
        pytest.skip(f"this is {platform.machine()}, not x86-64, whose layouts these are (use such a machine)")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (apt-get install gcc linux-libc-dev)")
    native = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True)
    return ["-m64"] if wide else ["-m32", "-idirafter", f"/usr/include/{native.stdout.strip()}"]


def _compare(declared: Declarations, module: str, wide: bool, folder: Path) -> None:
    header = headers.HEADERS.get(module, Header())
    asked = headers.questions(declared, header, 0 if wide else 1)
    if not asked:
        return
    assert module in headers.HEADERS, f"lguestlib.abi.{module} declares what no header was named for"
    _expect_same(header, asked, _gcc_options(wide), folder)


def _expect_same(header: Header, asked: list[Question], options: list[str], folder: Path) -> None:
    told = headers.answers(header, asked, options, folder)
    wrong = [
        f"{question.subject}: {question.here:#x} here, {answer:#x} in C"
        for question, answer in zip(asked, told, strict=True)
        if question.here != answer
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_declarations_are_those_of_x86_64(module: str, tmp_path: Path) -> None:
    if sys.maxsize < 1 << 32:
        pytest.skip("this interpreter is a 32-bit one: run the test under a 64-bit one")
    _compare(declarations.declarations(module), module, True, tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_declarations_are_those_of_i386_under_a_32_bit_interpreter(module: str, tmp_path: Path) -> None:
    _compare(_by_i386()[module], module, False, tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_system_call_numbers_are_those_of_the_generic_table(module: str, tmp_path: Path) -> None:
    only_calls = Declarations({}, {}, declarations.declarations(module).syscalls, {})
    generic = Header(("asm-generic/unistd.h",))
    _expect_same(generic, headers.questions(only_calls, generic, 2), _gcc_options(True), tmp_path)


@pytest.mark.parametrize("module", headers.HEADERS)
def test_the_table_of_headers_names_nothing_that_is_gone(module: str) -> None:
    declared, header = declarations.declarations(module), headers.HEADERS[module]
    fields = {f"{name}.{field}" for name, layout in declared.layouts.items() for field in layout.fields}
    names = fields | declared.numbers.keys() | declared.texts.keys() | declared.layouts.keys()
    assert header.spelled.keys() | header.newer.keys() | header.nameless.keys() <= names
    assert header.flexible | header.unsigned_here <= fields
