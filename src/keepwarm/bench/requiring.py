"""What a benchmark takes for granted: where it does not hold, its figures mean nothing."""


class PathNotTaken(Exception):
    """Something else happened than the benchmark is there to measure."""


def require(condition: bool, problem: str) -> None:
    """Raise PathNotTaken unless the condition holds."""
    if not condition:
        raise PathNotTaken(problem)
