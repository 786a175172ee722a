"""What a step needs that depends on its number alone (keys, draws, schedules), computed for many steps at once.

Deriving one key in a compiled loop costs as much as a layer of a small network; for a block of steps together it costs
next to nothing. The numbers drawn are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal


def split(function: Callable[..., Any], *example: Any) -> tuple[Callable, Callable, int]:
    """`function(*args, step)` in two: `late(early(step), *args, step)` is its value.

    `example` are arguments like those to come. The third answer is the size of what `early` returns, in bytes.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(*example)
    jaxpr, tree = closed.jaxpr, jax.tree.structure(result)
    number = jaxpr.invars[-1]
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    fixed, numbered = set(constants), {number}
    first, rest = [], []
    for equation in jaxpr.eqns:
        needed = set(_variables(equation.invars))
        if needed <= fixed and not equation.effects:
            fixed |= set(equation.outvars)
            first.append(equation)
            rest.append(equation)
        elif needed <= fixed | numbered and not equation.effects:
            numbered |= set(equation.outvars)
            first.append(equation)
        else:
            rest.append(equation)
    read = {v for equation in rest for v in _variables(equation.invars)} | set(_variables(jaxpr.outvars))
    handed = [v for equation in first for v in equation.outvars if v in numbered and v in read]

    def early(step: jax.Array) -> list[jax.Array]:
        values = _evaluated(first, {**constants, number: step})
        return [values[v] for v in handed]

    def late(early: Sequence[jax.Array], *args: Any) -> Any:
        given = dict(zip(jaxpr.invars, jax.tree.leaves(args), strict=True)) | dict(zip(handed, early, strict=True))
        values = _evaluated(rest, {**constants, **given})
        return jax.tree.unflatten(tree, [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars])

    return early, late, sum(v.aval.size * v.aval.dtype.itemsize for v in handed)


def _variables(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if not isinstance(v, Literal)]


def _evaluated(equations: Iterable[Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """The equations' outputs added to the values of the variables that they read."""
    for equation in equations:
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        functions, parameters = equation.primitive.get_bind_params(equation.params)
        outputs = equation.primitive.bind(*functions, *inputs, **parameters)
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return values
