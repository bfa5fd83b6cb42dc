"""Other ways of surviving a failure, run in the harness of the benches."""
