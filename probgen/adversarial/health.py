"""What the curves of an adversarial training say of it: divergence, and a critic that is too strong or too weak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

WON, LOST, BEHIND, GROWN = 0.98, 0.52, 0.4, 20.0


def signs(metrics: Mapping[str, Sequence[float]]) -> list[str]:
    """One sentence for each thing to know, with what to try; empty where no critic was trained."""
    said = []
    for name in metrics:
        if not (name.startswith("term/") and name.endswith("_accuracy")):
            continue
        critic, late = name.removeprefix("term/").removesuffix("_accuracy"), _late(metrics[name])
        if not np.isfinite(late):
            said.append(
                f"{critic} gives no number at the end: the two players have diverged; try a lower lr and a penalty"
            )
        elif late > WON:
            said.append(
                f"{critic} tells real rows from fake ones {late:.0%} of the time at the end, so the program has little to learn "
                "from: try R1, R2 or a GradientPenalty, a lower lr for it, or the objective 'wasserstein' or 'relativistic'"
            )
        elif late < BEHIND:
            said.append(
                f"{critic} is right {late:.0%} of the time at the end, less than by chance: it is behind the program; try a higher lr "
                "for it, or more critic_steps"
            )
        elif late < LOST:
            said.append(
                f"{critic} is right {late:.0%} of the time at the end: real and fake rows are alike to it, which is success if the "
                "samples are good, and otherwise a critic that is too small, too constrained or updated too rarely"
            )
        else:
            said.append(f"{critic} is right {late:.0%} of the time at the end, where half is chance")
    norms = [value for value in metrics.get("grad_norm", ()) if value is not None and np.isfinite(value)]
    if said and len(norms) >= 10:
        early, late = np.median(norms[len(norms) // 10 : len(norms) // 2]), _late(norms)
        if late > GROWN * max(early, 1e-12):
            said.append(
                f"gradients have grown from {early:.3g} to {late:.3g}, as they do where the two players diverge: try a lower lr, Adam "
                "with betas (0, 0.9), a penalty, or optimizer='optimistic-adam'"
            )
    return said


def _late(values: Sequence[float]) -> float:
    """The mean over the last tenth."""
    kept = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(kept[-max(1, len(kept) // 10) :])) if kept else float("nan")
