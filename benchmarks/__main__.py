"""`python -m benchmarks`: what maintainers measure, with a verdict on each."""

from benchmarks.table import BENCHMARKS
from keepwarm.cli.benchmark import command_line

if __name__ == "__main__":
    command_line("python -m benchmarks", "What maintainers measure.", BENCHMARKS)()
