"""What code means, as text for a hash: a change of comments, docstrings or layout alone compiles nothing again."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton

CPP_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|\s+', re.DOTALL)


def of_function(function: Callable[..., Any]) -> str:
    """A Python function."""
    return _of_tree(ast.parse(textwrap.dedent(inspect.getsource(function))))


@functools.cache
def of_kernel(kernel: triton.JITFunction) -> str:
    """A Triton kernel with all kernels that it calls and all constants that it reads."""
    found: dict[int, str] = {}
    _collect(kernel, found)
    return "\n".join([found.pop(id(kernel)), *sorted(found.values())])


def of_cpp(text: str) -> str:
    """C++ or CUDA: what is between comments and white space; string literals as they are."""
    return CPP_TOKEN.sub(lambda match: match[0] if match[0].startswith('"') else "", text)


def _of_tree(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _collect(kernel: triton.JITFunction, found: dict[int, str]) -> None:
    if id(kernel) in found:
        return
    tree = kernel.parse()
    used = [_value(node, kernel.__globals__) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    constants = {repr(value) for value in used if type(value).__name__ == "constexpr"}
    found[id(kernel)] = _of_tree(tree) + " ".join(sorted(constants))
    for value in used:
        if type(value).__name__ == "JITFunction" and not value.__module__.startswith("triton."):
            _collect(value, found)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module, stands for; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        module = _value(node.value, names)
        return getattr(module, node.attr, None) if isinstance(module, ModuleType) else None
    return None
