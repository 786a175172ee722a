"""Side by side: probgen, the PPLs' own loops, and the same step written by hand. `python -m benchmarks`."""
