"""NUTS, written once for both backends: a backend runs its PPL's kernel, and lends the runs of the program."""
