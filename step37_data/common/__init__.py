"""Helpers for text and images: argument checks, threads, install hints, image entries."""
