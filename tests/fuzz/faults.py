"""What a broken promise is."""


class Fault(AssertionError):
    """A broken promise, with what it takes to see it again."""


FAULTS: list[str] = []  # the engine takes what is raised within a workflow for the workflow's own bug


def expect(holds: bool, what: str) -> None:
    if not holds:
        FAULTS.append(what)
        raise Fault(what)
