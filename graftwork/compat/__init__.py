"""Patches of megatron-core: importing this package makes it run on machines without CUDA. Nothing of our own is here.

Every module that touches megatron-core imports ``graftwork.compat`` first: megatron-core binds compiled functions
and autocast devices while it is being imported, so the accommodations must already be in place. What is patched with
CUDA too needs megatron-core itself, which ``graftwork.core`` imports first (``recompute``, ``frozen_linear``).
"""

from graftwork.compat import cpu

cpu.install()
