"""The agent of one node: its workers, its vault, its part in every recovery."""
