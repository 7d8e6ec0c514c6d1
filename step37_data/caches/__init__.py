"""Keeps lengths and downloaded files on disk, and decides which rank fills these caches."""
