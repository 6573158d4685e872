"""Measures the cost of ReFT beside that of the frozen base, LoRA and other libraries: `python -m benchmarks --help`."""
