"""kdbench: the library behind a workflow that compares distillation methods of language models."""

__version__ = "0.1.0"
