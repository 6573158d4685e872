"""What ReFT costs, beside the frozen base, LoRA and the peers: `python -m benchmarks --help`."""
