"""Figures and shapes as tables and pictures say them."""

from __future__ import annotations


def significant(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f}" if value < 1e7 else f"{value / 1e6:,.0f}"


def value_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cell(value: float | int | None, text: object) -> str:
    return "–" if value is None else text(value)  # type: ignore[operator]


def heading(op: str, shape: dict[str, object]) -> str:
    return ", ".join([op, *(f"{name} = {value_text(value)}" for name, value in shape.items())])
