"""What is measured: a module a subject of ``python -m bench``."""
