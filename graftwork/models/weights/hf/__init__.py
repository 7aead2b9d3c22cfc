"""Hugging Face families, one file each: the architectures it answers to, how its config reads, its mapping."""
