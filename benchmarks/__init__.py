"""What this package costs in time and memory, measured beside others: `python -m benchmarks --help`."""
