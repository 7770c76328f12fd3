"""Which tensors of many a caller means: one, several by name, or all that match a pattern."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from fremap.errors import ArgumentError, ArgumentTypeError, FormatError
from fremap.formats.table import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Names", "names_of", "pattern_hint", "some_names"]

_LISTED = "`fremap inspect` lists those that there are"
_PLACEHOLDER = re.compile(r"\{[A-Za-z_]?[A-Za-z0-9_]*\}")
# What other libraries write where a pattern of fremap has {i}.
_LIKE_PATTERN = re.compile(r"[*?%]|\{.*\}")
_NAMES_SHOWN = 8
# Digits of a number in a name: fewer than an int64 has.
_MAX_DIGITS = 18


class Names(NamedTuple):
    """The tensors that a caller means.

    Attributes
    ----------
    exact : tuple of str
        Their names in order; empty for a pattern, and where the one tensor that there is is meant.
    pattern : str or None
        Names with one number in them: text with ``{i}`` where the number is.
    many : bool
        Whether they are looked up in all files together, each in one of them. One name alone
        is looked up in each file.
    """

    exact: tuple[str, ...] = ()
    pattern: str | None = None
    many: bool = False

    @property
    def any(self) -> bool:
        """Whether no tensor was named, so that there must be one only."""
        return not self.exact and self.pattern is None

    @property
    def before(self) -> str:
        """What names of a pattern begin with."""
        return _PLACEHOLDER.split(self.pattern or "")[0]

    def matcher(self) -> re.Pattern[str]:
        """Return what matches the names of a pattern; group 1 is the number."""
        before, after = _PLACEHOLDER.split(self.pattern or "{}")
        return re.compile(f"{re.escape(before)}([0-9]{{1,{_MAX_DIGITS}}}){re.escape(after)}")

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that the caller wants, in any order."""
        if self.pattern is None:
            known = set(names)
            return [name for name in self.exact if name in known]
        match = self.matcher().fullmatch
        return [name for name in names if match(name)]

    def in_order(self, places: Mapping[str, list[str]], where: str) -> list[str]:
        """Return the wanted names in order, each of which must be in one file.

        Parameters
        ----------
        places : mapping of str to list of str
            For each name that was found, the files that have it.
        where : str
            What messages call all that was searched.

        Returns
        -------
        list of str
            The names.
        """
        for name, files in places.items():
            if len(files) > 1:
                raise FormatError(
                    f"rows: tensor {shown(name)} is in {files[0]} and in {files[1]}; each must be "
                    "in one file only"
                )
        if self.pattern is None:
            missing = [name for name in self.exact if name not in places]
            if missing:
                hint = pattern_hint(missing)
                raise FormatError(f"rows: {where} has no tensor {_some(missing)}; {_LISTED}{hint}")
            return list(self.exact)
        return self._numbered(list(places), where)

    def _numbered(self, names: list[str], where: str) -> list[str]:
        """Return names in the order of their numbers, which begin with 0 or 1."""
        if not names:
            raise FormatError(
                f"rows: {where} has no tensor that matches {shown(self.pattern)}; {_LISTED}"
            )
        matched = self.matcher()
        by_number: dict[int, str] = {}
        for name in names:
            found = matched.fullmatch(name)
            number = int(found[1]) if found else 0
            if number in by_number:
                raise FormatError(
                    f"rows: {where} has tensors {shown(by_number[number])} and {shown(name)}: "
                    f"number {number} of {shown(self.pattern)} occurs twice; pass a list of names"
                )
            by_number[number] = name
        numbers = sorted(by_number)
        first, last = numbers[0], numbers[-1]
        ordered = [by_number[number] for number in numbers]
        if first > 1:
            raise FormatError(
                f"rows: tensors that match {shown(self.pattern)} in {where} begin with "
                f"{shown(ordered[0])}; number 0 or 1 is missing (to begin there, name the tensors "
                "in a list)"
            )
        if last - first + 1 != len(numbers):
            at = next(at for at, number in enumerate(numbers) if number != first + at)
            absent = self._name(first + at, ordered[at - 1])
            raise FormatError(
                f"rows: {where} has no tensor {shown(absent)} between {shown(ordered[at - 1])} and "
                f"{shown(ordered[at])}; {last - first + 1 - len(numbers)} numbers of "
                f"{shown(self.pattern)} are missing"
            )
        return ordered

    def _name(self, number: int, like: str) -> str:
        """Return the name with a number, written with as many digits as another one."""
        before, after = _PLACEHOLDER.split(self.pattern or "{}")
        digits = like[len(before) : len(like) - len(after)]
        width = len(digits) if digits.startswith("0") and len(digits) > 1 else 0
        return f"{before}{number:0{width}}{after}"


def names_of(tensor: object) -> Names:
    """Return what `tensor=` of a caller means.

    Parameters
    ----------
    tensor : str, list of str, or None
        A name, names, or a pattern with one number.

    Returns
    -------
    Names
        Which tensors.
    """
    if tensor is None:
        return Names()
    if isinstance(tensor, str):
        placeholders = len(_PLACEHOLDER.findall(tensor))
        if placeholders > 1:
            raise ArgumentError(
                f"rows: tensor={shown(tensor)} has {placeholders} placeholders; a pattern has one, "
                "and names in a list are taken as they are"
            )
        return Names(pattern=tensor, many=True) if placeholders else Names((tensor,))
    if not isinstance(tensor, list | tuple) or not all(isinstance(name, str) for name in tensor):
        raise ArgumentTypeError(
            f"rows: tensor must be a name, a list of names or a pattern, not {shown(tensor)}"
        )
    if not tensor:
        raise ArgumentError("rows: tensor is an empty list, which names no tensor")
    if len(set(tensor)) < len(tensor):
        twice = next(name for name in tensor if tensor.count(name) > 1)
        raise ArgumentError(f"rows: tensor names {shown(twice)} twice")
    return Names(tuple(tensor), many=True)


def pattern_hint(names: Iterable[str]) -> str:
    """Return what to add to a message that there are no tensors of these names.

    Parameters
    ----------
    names : iterable of str
        What the caller wrote.

    Returns
    -------
    str
        Empty, unless one looks like a pattern of another library.
    """
    if any(_LIKE_PATTERN.search(name) for name in names):
        return "; in a pattern, {i} stands for the number"
    return ""


def some_names(names: Iterable[str]) -> str:
    """Return a few of many names for a message."""
    return _some(sorted(names))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(shown, names[:_NAMES_SHOWN])) + more
