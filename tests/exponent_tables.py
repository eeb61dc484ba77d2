"""What the tables of exponents hold, and a table with one exponent changed."""

import dataclasses
from typing import Any

from mupjax import Exponents

# Any: pyright takes a name out of a list for any string.
ROLES: tuple[Any, ...] = ("input", "hidden", "output", "vector")
FAMILIES: tuple[Any, ...] = ("sgd", "adam", "spectral")
COLUMNS = [field.name for field in dataclasses.fields(Exponents)]


def changed(parametrization, family, role, column, by=0.25):
    table = dict(parametrization.table(family))
    table[role] = dataclasses.replace(table[role], **{column: getattr(table[role], column) + by})
    return dataclasses.replace(parametrization, rows={**parametrization.rows, family: table})
