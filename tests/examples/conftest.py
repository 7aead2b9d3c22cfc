"""What the examples share with the pages: a directory where ``smollm2_135m`` is tiny."""

from tests.docs.conftest import desk, small_desk, tiny_base

__all__ = ["desk", "small_desk", "tiny_base"]
