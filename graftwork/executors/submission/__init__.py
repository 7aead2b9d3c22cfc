"""NeMo Run's experiments as they are submitted here: one task, a pool of them, a job array, or their text."""
