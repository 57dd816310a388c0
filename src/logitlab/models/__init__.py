"""Models: load them, find their layer stack, sites and tail, prove them, and capture activations."""
