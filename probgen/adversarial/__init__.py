"""Adversarial training as far as both backends share it: objectives of two players, penalties, and what a loss is told."""

from probgen.adversarial.objectives import Objective as Objective
from probgen.adversarial.penalties import R1 as R1
from probgen.adversarial.penalties import R2 as R2
from probgen.adversarial.penalties import GradientPenalty as GradientPenalty
from probgen.adversarial.penalties import OrthogonalRegularization as OrthogonalRegularization
from probgen.adversarial.penalties import WeightClip as WeightClip
