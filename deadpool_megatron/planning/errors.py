"""The one way a plan is refused."""


class PlanError(ValueError):
    """The file is malformed, or what it describes cannot work. The message is one line for the user."""
