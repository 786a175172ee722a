"""Distributions that Pyro lacks, under the names they have in NumPyro."""
