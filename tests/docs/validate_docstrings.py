"""Validate the docstrings of all that users import: `python tests/docs/validate_docstrings.py`.

numpydoc's rules, less those that pyproject.toml leaves out, on the objects as
they are at run time: all names in `__all__`, and the public members of the
classes among them. (numpydoc's own hook reads the source, knows no properties,
and takes private functions for public ones.)
"""

import dataclasses
import enum
import importlib
import importlib.util
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from numpydoc.validate import Validator, validate

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
MODULES = ["fremap", "fremap.calibration", "fremap.testing"]
MODULES += [f"fremap.{name}" for name in ("ray", "torch") if importlib.util.find_spec(name)]


def public_names() -> Iterator[str]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if name.startswith("__") or inspect.ismodule(thing) or not callable(thing):
                continue
            # By the module that has it: a function or class may have the name of its module.
            home = getattr(thing, "__module__", module_name)
            if not home.startswith("fremap"):
                home = thing.__new__.__module__  # `memmap` says that it is NumPy's
            where = f"{home}.{name}"
            yield where
            if not inspect.isclass(thing):
                continue
            for member, value in vars(thing).items():
                described = inspect.isroutine(value) or isinstance(value, property)
                if not member.startswith("_") and described:
                    yield f"{where}.{member}"


def problems() -> Iterator[str]:
    settings = tomllib.loads(PYPROJECT.read_text())["tool"]["numpydoc_validation"]
    left_out = set(settings["checks"]) - {"all"}
    for name in public_names():
        # A function that is named as its module is found by where it stands.
        module, _, last = name.rpartition(".")
        thing = getattr(Validator._load_obj(module), last)
        if inspect.isfunction(thing):
            name = f"{thing.__module__}.{thing.__qualname__}"
        # Their fields stand under "Attributes"; nobody makes them by hand.
        record = dataclasses.is_dataclass(thing) or isinstance(thing, enum.EnumType)
        for code, text in validate(name)["errors"]:
            if code not in left_out and not (record and code == "PR01"):
                yield f"{name}: {code} {text}"


if __name__ == "__main__":
    found = list(problems())
    print("\n".join(found) or f"{len(list(public_names()))} docstrings are as numpydoc wants them")
    sys.exit(bool(found))
