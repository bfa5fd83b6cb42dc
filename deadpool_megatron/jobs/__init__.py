"""Whole jobs, started and watched by a program."""
