"""What a benchmark takes for granted: where it does not hold, its figures would mean nothing."""


class PathNotTaken(Exception):
    """Something else was done than the benchmark is there to show."""


def require(condition: bool, problem: str) -> None:
    """Raise PathNotTaken unless the condition holds."""
    if not condition:
        raise PathNotTaken(problem)
