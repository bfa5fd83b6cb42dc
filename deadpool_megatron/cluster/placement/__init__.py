"""Who keeps what for whom, and what all go on from. Pure."""
