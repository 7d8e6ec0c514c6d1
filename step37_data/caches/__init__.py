"""What is kept on disk, and which rank fills it."""
