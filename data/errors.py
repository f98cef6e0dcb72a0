"""What goes wrong where data is read or written: the user's to mend, or nobody's."""


class CorpusError(ValueError):
    """A corpus that cannot be opened or read; the message is one line for the user."""


class StoreUnavailable(OSError):
    """A store that could not be reached, or did not answer as it should, within our patience. One line, no mistake."""
