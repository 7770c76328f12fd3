"""The table of errors has each of them, with the builtin that it is and its own words."""

from pathlib import Path

from fremap import errors

PAGE = Path(__file__).parents[2] / "docs/errors.md"


def test_the_table_is_what_the_classes_say() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 3 and "`" in row[0]}
    assert set(table) == set(errors.__all__)
    for name, (builtin, when) in table.items():
        kind = getattr(errors, name)
        assert builtin.strip("`") in [base.__name__ for base in kind.__mro__]
        assert when == str(kind.__doc__).splitlines()[0]
