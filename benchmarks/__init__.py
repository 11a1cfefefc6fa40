"""Speed and memory of this package next to timm and the original: `python -m benchmarks --help`."""
