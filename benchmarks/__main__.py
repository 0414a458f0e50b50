"""`python -m benchmarks`: what maintainers measure, with a verdict on each."""

import sys

from benchmarks.table import BENCHMARKS
from keepwarm.cli.benchmark import command_line
from keepwarm.core.errors import KeepwarmError


def main() -> None:
    """Run the command line. An error that Keepwarm raises on purpose is printed as one line."""
    try:
        command_line("python -m benchmarks", "What maintainers measure.", BENCHMARKS)()
    except KeepwarmError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
