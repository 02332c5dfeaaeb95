"""The registry of distillation methods.

A method is one module of this package, under the method's name; or it comes from elsewhere: from an installed package, by an entry point
of the group `kdbench.methods`, or from a Python file that a configuration names. See docs/adding_a_method.md.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path

from kdbench import files
from kdbench.errors import UserError, nearest

GROUP = "kdbench.methods"
_NOT_METHODS = {"base"}


def own() -> list[str]:
    """The methods of kdbench itself, by name; imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_METHODS)


def names() -> list[str]:
    """Every method that has a name: those of kdbench and of installed packages; imports none of them.

    Raises:
        UserError: two of them have the same name.
    """
    return sorted([*own(), *_offered()])


def get(name: str):
    """The `Method` class of a name, or of a Python file if the name is the path of one (it ends with .py).

    Raises:
        UserError: there is no such method (names the nearest one) or file; it does not define exactly one method.
    """
    if _is_file(name):
        return _only_method(_load_file(Path(name).resolve(), sha256(name)), name)
    if name in own():
        return _only_method(importlib.import_module(f"{__name__}.{name}"), name)
    offered = _offered()
    if name not in offered:
        raise UserError(nearest(name, names(), "a method"))
    return _checked(offered[name], name)


def sha256(name: str) -> str | None:
    """Of the Python file that a method from elsewhere is defined in; None for kdbench's own, whose `version` counts.

    Raises:
        UserError: as for `get`.
    """
    if _is_file(name):
        if not Path(name).is_file():
            raise UserError(f"method {name}: there is no such file (paths start from the folder of the Snakefile)")
        return files.sha256(Path(name))
    if name in own():
        return None
    return files.sha256(Path(sys.modules[get(name).__module__].__file__))


def _is_file(name: str) -> bool:
    return name.endswith(".py")


@cache
def _load_file(path: Path, content: str):
    """A module from a file; `content`, its sha256, names it, so that a changed file is another module."""
    name = f"kdbench_method_{path.stem}_{content[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[name]
        raise UserError(f"method {path}: it cannot be imported ({error})") from None
    return module


def _only_method(module, name: str):
    """The one `Method` class that a module defines."""
    from kdbench.methods.base import Method

    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        listed = f"defines {', '.join(sorted(cls.__name__ for cls in found))}" if found else "defines none"
        raise UserError(
            f"method {name}: a file has to define one subclass of kdbench.methods.base.Method, this one {listed}"
        )
    return found[0]


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    """Methods of installed packages."""
    found = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in own() or found.get(entry.name, entry).value != entry.value:
            raise UserError(
                f"method {entry.name}: the package {_package(entry)} gives one of this name, and so does "
                f"{'kdbench' if entry.name in own() else _package(found[entry.name])}; uninstall one of them"
            )
        found[entry.name] = entry
    return found


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _checked(entry: importlib.metadata.EntryPoint, name: str):
    from kdbench.methods.base import Method

    try:
        cls = entry.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"method {name} of the package {_package(entry)}: it cannot be imported ({error})") from None
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(
            f"method {name} of the package {_package(entry)}: {entry.value} is no subclass of kdbench.methods.base.Method"
        )
    return cls
