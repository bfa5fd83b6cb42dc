"""The demo: a training run, the same run with a node killed in mid-iteration, and the proof that both are equal."""

from deadpool_megatron.demo.main import main

__all__ = ["main"]
