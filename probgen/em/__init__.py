"""Expectation-maximisation, written once for both backends: a backend lends the runs of the program and its operators."""
