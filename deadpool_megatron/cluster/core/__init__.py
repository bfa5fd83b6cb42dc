"""The coordinator's decisions, pure: events in, actions out."""
