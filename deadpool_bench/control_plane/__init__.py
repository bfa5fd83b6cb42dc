"""The control plane with thousands of simulated agents."""
