"""What the frameworks around the kernels do, and what the kernels have to match."""
