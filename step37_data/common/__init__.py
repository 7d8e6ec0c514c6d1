"""Argument checks, threads, install hints and the names that text and images share."""
