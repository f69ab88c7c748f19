"""``python -m hora_bench``, for launchers that start modules."""

from hora_bench.cli import main

main()
