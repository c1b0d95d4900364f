"""What the modules of `lguestlib.abi` declare, found by walking them.

Run as a program, under any interpreter, it prints the declarations as JSON: the
layouts are then those of that interpreter's platform.
"""

import ctypes
import importlib
import json
import pkgutil
import warnings
from dataclasses import asdict, dataclass
from types import ModuleType

import lguestlib.abi


@dataclass(frozen=True)
class Field:
    offset: int
    size: int
    signed: bool | None
    """None for what is not one integer."""


@dataclass(frozen=True)
class Layout:
    size: int
    fields: dict[str, Field]


@dataclass(frozen=True)
class Declarations:
    """Of one module: everything public that is a number, bytes, or a structure, each under its name."""

    numbers: dict[str, int]
    texts: dict[str, str]
    """Bytes constants, as hexadecimal digits."""
    syscalls: dict[str, tuple[int, int, int]]
    layouts: dict[str, Layout]


def module_names() -> list[str]:
    """The modules of `lguestlib.abi`, all of them."""
    return sorted(module.name for module in pkgutil.iter_modules(lguestlib.abi.__path__))


def declarations(module_name: str) -> Declarations:
    """What `lguestlib.abi.<module_name>` declares.  Raises TypeError for a constant of an unknown kind."""
    module = importlib.import_module(f"lguestlib.abi.{module_name}")
    found = Declarations({}, {}, {}, {})
    for name, value in vars(module).items():
        if isinstance(value, type):
            if value.__module__ == module.__name__ and issubclass(value, (ctypes.Structure, ctypes.Union)):
                if hasattr(value, "_fields_"):
                    found.layouts[name] = _layout(value)
        elif name.startswith("SYS_"):
            found.syscalls[name] = value
        elif _is_constant(name, value):
            if isinstance(value, int):
                found.numbers[name] = int(value)
            elif isinstance(value, bytes):
                found.texts[name] = value.hex()
            else:
                raise TypeError(f"{module.__name__}.{name}: cannot be compared with a C header")
    return found


def _is_constant(name: str, value: object) -> bool:
    if name.startswith("_") or isinstance(value, (bool, ModuleType)) or callable(value):
        return False
    return name.isupper() or isinstance(value, (int, bytes))


def _layout(structure: "type[ctypes.Structure] | type[ctypes.Union]") -> Layout:
    fields = {}
    for name, kind, *_ in structure._fields_:
        descriptor = getattr(structure, name)
        fields[name] = Field(descriptor.offset, ctypes.sizeof(kind), _signed(kind))
    return Layout(ctypes.sizeof(structure), fields)


def _signed(kind: type) -> bool | None:
    code = getattr(kind, "_type_", None)
    if not isinstance(code, str) or code not in "bBhHiIlLqQ":
        return None
    return code.islower()


def from_json(text: str) -> dict[str, Declarations]:
    """The declarations by module, from what this program printed."""
    modules = {}
    for module, found in json.loads(text).items():
        layouts = {
            name: Layout(layout["size"], {field: Field(**facts) for field, facts in layout["fields"].items()})
            for name, layout in found["layouts"].items()
        }
        syscalls = {name: (a, b, c) for name, (a, b, c) in found["syscalls"].items()}
        modules[module] = Declarations(found["numbers"], found["texts"], syscalls, layouts)
    return modules


if __name__ == "__main__":
    warnings.simplefilter("error")  # a layout that a newer release deprecates
    print(json.dumps({name: asdict(declarations(name)) for name in module_names()}))
