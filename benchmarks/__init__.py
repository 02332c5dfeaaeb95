"""How much a distillation step costs: `python -m benchmarks.bench`, described in docs/benchmarks.md."""
