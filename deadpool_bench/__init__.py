"""Measurements of what DeadPool costs and gains, against baselines in the same harness."""
