"""Adapters folded into a checkpoint, tensor by tensor and without a model: what is written answers as both together.

``source`` opens an adapter of ours or of Hugging Face PEFT, ``changes`` says what a method makes of a weight, ``write``
writes the directory; ``combine`` makes one adapter of several.
"""

from graftwork.models.merging.combine import Blend, combine_directories, merge_combined
from graftwork.models.merging.write import merge_directory

__all__ = ["Blend", "combine_directories", "merge_combined", "merge_directory"]
