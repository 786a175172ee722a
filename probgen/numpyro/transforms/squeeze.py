"""Images as stacks of channels: their layout, and 2×2 pixels as four channels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from probgen.flow_shapes import channels_first, squeezed
from probgen.numpyro.transforms.bijection import Bijection


class ChannelsFirst(Bijection):
    """Images as data have them, [H, W] or [H, W, C], as networks take them, [C, H, W]; log |det| = 0."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, channels_first(shape))

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[*, H, W, C] → [*, C, H, W]."""
        lead = x.shape[: x.ndim - len(self.shape)]
        return (x[..., None, :, :] if len(self.shape) == 2 else jnp.moveaxis(x, -1, -3)), jnp.zeros(lead, x.dtype)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[*, C, H, W] → [*, H, W, C]."""
        return (y.squeeze(-3) if len(self.shape) == 2 else jnp.moveaxis(y, -3, -1)), jnp.zeros(y.shape[:-3], y.dtype)


class Squeeze(Bijection):
    """[*, C, H, W] → [*, 4 C, H/2, W/2]: the 2×2 pixels of a block become channels; log |det| = 0."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, squeezed(shape))

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Blocks of pixels → channels."""
        lead, (channels, height, width) = x.shape[:-3], self.shape
        blocks = x.reshape(*lead, channels, height // 2, 2, width // 2, 2)
        return jnp.moveaxis(blocks, (-3, -1), (-4, -3)).reshape(*lead, *self.onto), jnp.zeros(lead, x.dtype)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Channels → blocks of pixels."""
        lead, (channels, height, width) = y.shape[:-3], self.shape
        blocks = y.reshape(*lead, channels, 2, 2, height // 2, width // 2)
        return jnp.moveaxis(blocks, (-4, -3), (-3, -1)).reshape(*lead, *self.shape), jnp.zeros(lead, y.dtype)
