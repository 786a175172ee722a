"""Shapes of the events that a flow maps, and what is said of one that does not fit; both backends' transforms ask here."""

from __future__ import annotations

from collections.abc import Sequence

from probgen.errors import ProbgenError

Shape = Sequence[int | None]  # of an event; None stands for any length


def refuse_shape(name: str, found: Sequence[int], wanted: Shape) -> None:
    """Refuse a batch whose last axes are not an event of the transform called `name`."""
    last = tuple(found)[max(0, len(found) - len(wanted)) :]
    if len(last) == len(wanted) and all(n in (None, m) for n, m in zip(wanted, last, strict=True)):
        return
    shown = ", ".join("*" if n is None else str(n) for n in wanted)
    raise ProbgenError(
        f"{name} takes events of shape [{shown}], and the last axes here are {list(last)}: build it for the shape of the "
        "data"
    )


def filled(pattern: Shape, like: Sequence[int]) -> tuple[int, ...]:
    """A shape with its open lengths taken from another one."""
    if None not in pattern:
        return tuple(pattern)
    return tuple(m if n is None else n for n, m in zip(pattern, like[len(like) - len(pattern) :], strict=True))


def refuse_misfit(transform: str, wanted: int, batch_shape: Sequence[int], event_shape: Sequence[int]) -> None:
    """Refuse a base whose events have other axes than what a transform gives, where its batch cannot lend them."""
    if len(event_shape) <= wanted <= len(event_shape) + len(batch_shape):
        return
    raise ProbgenError(
        f"Flow: {transform} gives events of {wanted} axes, and the base has the shape {[*batch_shape, *event_shape]} with "
        f"events of {len(event_shape)}: give it a shape of as many axes, e.g. Normal(zeros(2), 1.0).to_event(1)"
    )


def outside_the_base(site: str, where: str, value: float) -> str:
    """What is said of data that a flow maps to where its base has no density."""
    return (
        f"{where} has a row that the flow of the site {site!r} maps to {value:g}, outside the support of its base: take "
        "a base on all of space, e.g. Normal, or end the flow with a transform onto that support"
    )


def halves(channels: int, flip: bool = False) -> tuple[int, int]:
    """How many channels of an event a coupling keeps, and how many it changes.

    Raises:
        ProbgenError: a single channel, which has nothing beside it to be told by.
    """
    if channels < 2:
        raise ProbgenError(
            f"a coupling needs at least 2 channels or dimensions, one part to say how the other is changed, and here "
            f"there is {channels}: use a spline of single numbers, e.g. models/flows/spline.py with coupling=False"
        )
    half = channels // 2
    return (half, channels - half) if flip else (channels - half, half)


def refuse_one_position(shape: Sequence[int]) -> None:
    """Refuse an image [C, H, W] of which no checkerboard can be made."""
    if shape[1] * shape[2] < 2:
        raise ProbgenError(
            "a checkerboard needs at least 2 positions, black and white, and the image has 1: couple its channels "
            "instead (ChannelCoupling)"
        )


def channels_first(shape: Sequence[int]) -> tuple[int, int, int]:
    """[H, W] or [H, W, C], as data have them, → [C, H, W], as networks take them."""
    if len(shape) not in (2, 3):
        raise ProbgenError(
            f"ChannelsFirst takes images [H, W] or [H, W, C], and here an event has the shape {list(shape)}"
        )
    height, width, channels = (*shape, 1)[:3]
    return channels, height, width


def squeezed(shape: Sequence[int]) -> tuple[int, int, int]:
    """[C, H, W] → [4 C, H/2, W/2]."""
    channels, height, width = shape
    if height % 2 or width % 2:
        raise ProbgenError(
            f"Squeeze halves the sides of an image, and one of {height} × {width} is odd: take fewer levels, or pad or "
            "crop the images to even sides"
        )
    return 4 * channels, height // 2, width // 2


def handed_on(shape: Sequence[int]) -> tuple[int, ...]:
    """The half of an image [C, H, W] on which the next level of a flow works."""
    if shape[0] % 2:
        raise ProbgenError(
            f"MultiScale hands on half of the channels, and there are {shape[0]}: let each level begin with a Squeeze"
        )
    return (shape[0] // 2, *shape[1:])
