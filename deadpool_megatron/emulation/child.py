"""Importing this emulates CUDA: what a process of multiprocessing begins with, before it unpickles anything."""

from __future__ import annotations

from deadpool_megatron.emulation import install

install(force=True)  # the parent has looked whether there is a GPU
