"""One step of the optimizer over all ranks."""
