"""The tables of option names against the enumerations of the compiled extension."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dgi_kernels import enums

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# C++ enumeration -> the table that numbers it
TABLES = {
    "Metric": enums.METRICS,
    "QuantizeMode": enums.MODES,
    "Normalize": enums.NORMALIZERS,
    "Reduction": enums.REDUCTIONS,
}


def enumerations() -> dict[str, tuple[str, ...]]:
    """Every ``enum class Name { kOne, kTwo };`` of csrc, with its values as Python spells them."""
    found = {}
    for path in sorted(CSRC.rglob("*.h")):
        for name, values in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", path.read_text()):
            words = [value.strip().removeprefix("k") for value in values.split(",")]
            found[name] = tuple(re.sub(r"(?<!^)(?=[A-Z])", "_", word).lower() for word in words)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_table_numbers_its_options_as_the_extension_does(name: str) -> None:
    assert enumerations()[name] == TABLES[name]


def test_every_table_is_compared() -> None:
    tables = {name for name in vars(enums) if name.isupper()}
    assert tables == {name for name, table in vars(enums).items() if any(table is t for t in TABLES.values())}
