"""What can go wrong with what the user gave."""


class PrepareError(ValueError):
    """Preparation cannot start or go on; the message says what to do."""
