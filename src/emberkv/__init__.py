"""emberkv keeps the attention state of every prompt warm, and proves that what it reuses is right."""

__version__ = "0.1.0"
