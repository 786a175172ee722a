"""Unnormalised densities, on plain array operators: Langevin's step, the losses' arithmetic, and log Z by annealing."""

from probgen.energy.langevin import Langevin as Langevin
