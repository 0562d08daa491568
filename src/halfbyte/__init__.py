"""halfbyte fine-tunes large language models on small machines, and proves what came of it."""

__version__ = "0.1.0"
