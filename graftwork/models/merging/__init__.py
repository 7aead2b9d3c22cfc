"""Adapters folded into a checkpoint, tensor by tensor and without a model: what is written answers as both together.

``source`` opens an adapter of ours or of Hugging Face PEFT, ``changes`` says what a method makes of a weight, ``write``
writes the directory.
"""

from graftwork.models.merging.write import merge_directory

__all__ = ["merge_directory"]
