"""The registry of distillation methods: a method is one module of this package, under the method's name."""

import importlib
import pkgutil

from kdbench.errors import UserError, nearest

_NOT_METHODS = {"base"}


def names() -> list[str]:
    """Every method, by name; imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_METHODS)


def get(name: str):
    """The `Method` class of a name.

    Raises:
        UserError: there is no such method; names the nearest one.
    """
    if name not in names():
        raise UserError(nearest(name, names(), "a method"))
    module = importlib.import_module(f"{__name__}.{name}")
    from kdbench.methods.base import Method

    (method,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    )
    return method
