"""A Reading as a terminal grid, an interactive page or a publication figure."""
