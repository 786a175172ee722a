"""What a step needs that depends on its number alone (keys, draws, schedules), computed for many steps at once.

Deriving one key in a compiled loop costs as much as a layer of a small network; for a block of steps together it costs
next to nothing. The numbers drawn are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun


class Split:
    """`function(*args, step)` in two: `late(early(step), *args, step)` is its value.

    `example` are arguments like those to come. `size` is that of what `early` returns, in bytes; `result` the shapes
    of the value, `text` the function's operations.
    """

    def __init__(self, function: Callable[..., Any], *example: Any) -> None:
        closed, self.result = jax.make_jaxpr(function, return_shape=True)(*example)
        jaxpr, self._tree, self.text = closed.jaxpr, jax.tree.structure(self.result), str(closed)
        number = jaxpr.invars[-1]
        first, rest, handed = _parts(jaxpr, number)
        unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
        early = jaxpr.replace(invars=[number], outvars=handed, eqns=first, debug_info=unnamed)
        late = jaxpr.replace(invars=[*handed, *jaxpr.invars], eqns=rest, debug_info=unnamed)
        self._early, self._late = (jaxpr_as_fun(ClosedJaxpr(part, closed.consts)) for part in (early, late))
        self.size = sum(v.aval.size * v.aval.dtype.itemsize for v in handed)

    def early(self, step: jax.Array) -> list[jax.Array]:
        """What depends on the step's number alone."""
        return self._early(step)

    def late(self, early: Sequence[jax.Array], *args: Any) -> Any:
        """The function's value, given what was computed early."""
        return jax.tree.unflatten(self._tree, self._late(*early, *jax.tree.leaves(args)))


def _parts(jaxpr: Any, number: Any) -> tuple[list, list, list]:
    """The equations to run early, the others, and the variables that the early ones hand to them."""
    fixed, numbered, first, rest = set(jaxpr.constvars), {number}, [], []
    for equation in jaxpr.eqns:
        needed = set(_variables(equation.invars))
        if equation.effects or not needed <= fixed | numbered:
            rest.append(equation)
            continue
        first.append(equation)
        if needed <= fixed:
            fixed |= set(equation.outvars)
            rest.append(equation)
        else:
            numbered |= set(equation.outvars)
    read = {v for equation in rest for v in _variables(equation.invars)} | set(_variables(jaxpr.outvars))
    return first, rest, [v for equation in first for v in equation.outvars if v in numbered and v in read]


def _variables(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if not isinstance(v, Literal)]
