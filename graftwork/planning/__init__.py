"""What a run will take and whether it can work, told before it is built: no GPU, no weights, no process groups."""
