"""What a user may see: an error that says where, what, what was expected and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something in the user's input or machine is wrong; the command ends with exit code 2.

    The message is complete without a traceback: `where` names the file and line, setting or
    argument, `what` the offending value, `expected` what would have been right, and `remedy`
    the next thing to type or change.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", remedy: str = "") -> None:
        self.what, self.where, self.expected, self.remedy = what, where, expected, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not survive the way back from a worker process.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.remedy)


def _rebuild(kind: type[UserError], what: str, where: str, expected: str, remedy: str) -> UserError:
    return kind(what, where=where, expected=expected, remedy=remedy)


class Interrupted(Exception):
    """A run was asked to stop and has written a checkpoint; the command ends with exit code 75."""
