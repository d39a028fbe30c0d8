"""The one way to say no. Alone in its file, so that `comp --help` imports nothing else."""


class Refused(Exception):
    """The user's mistake, or an artefact that must not be read: one line each, exit code 2."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = list(lines)
