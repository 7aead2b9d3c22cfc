"""The adapter directory on disk."""
