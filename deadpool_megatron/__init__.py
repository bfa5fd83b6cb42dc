"""DeadPool for Megatron-LM: pre-training that survives the permanent loss of nodes without ending the job."""

__all__ = ["__version__"]

__version__ = "0.1.0"
