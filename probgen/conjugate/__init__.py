"""Coordinate-ascent variational Bayes on programs whose priors are conjugate, read off the program."""
