"""What is wrong in the user's input, said in one message."""


class UserError(ValueError):
    """A mistake in what the user gave: the message names the file, record, field or layer, the value found
    and what to do. The command line prints it alone and exits with 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, no memory): the command line prints the message
    alone and exits with 1."""
