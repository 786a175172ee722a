"""A module as it stands: what a distribution keeps of a network that it calls after the program has run."""

from __future__ import annotations

from typing import Any

from torch import nn


def snapshot(network: Any) -> Any:
    """A module that shares the tensors of `network` and no longer follows it when others are put in their places.

    A density is computed after its program has run, when a trained program's weights are no longer in the module.
    What is no module is returned as it is.
    """
    if not isinstance(network, nn.Module):
        return network
    own = object.__new__(type(network))
    own.__dict__.update(network.__dict__)
    own.__dict__["_parameters"] = network._parameters.copy()
    own.__dict__["_buffers"] = network._buffers.copy()
    own.__dict__["_modules"] = {name: snapshot(part) for name, part in network._modules.items()}
    own.__dict__["_snapshot_of"] = original(network)
    return own


def original(module: nn.Module) -> nn.Module:
    """The module that a snapshot was taken of; any other is itself."""
    return module.__dict__.get("_snapshot_of", module)
