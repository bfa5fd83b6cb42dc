"""Connections between the processes of a job."""
