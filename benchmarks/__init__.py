"""Measures the cost of ReFT against the frozen base, LoRA and other libraries: `python -m benchmarks --help`."""
