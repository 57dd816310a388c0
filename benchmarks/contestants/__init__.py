"""What `compare.py` runs, each in a process and an environment of its own."""
