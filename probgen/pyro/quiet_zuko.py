"""Zuko's modules, imported without what the import does to every distribution."""

from __future__ import annotations

import types

from torch.distributions import Distribution

from probgen.extras import need


def zuko_module(name: str) -> types.ModuleType:
    """A module of Zuko's, `zuko.flows`, or the name of the extra that brings it.

    When imported, Zuko switches off the validation of every distribution there is; here it is left as it was.
    """
    before = Distribution._validate_args
    try:
        return need(name, "flows", "a flow of Zuko's")
    finally:
        Distribution.set_default_validate_args(before)
