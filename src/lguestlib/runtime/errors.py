"""What the launcher raises."""


class LaunchError(Exception):
    """A machine cannot be made as asked; the message is one line with the thing, the value and the remedy."""
