"""The adapter directory on disk: its files, its tensors in and out of a stack, its model card; no adapter's maths."""
