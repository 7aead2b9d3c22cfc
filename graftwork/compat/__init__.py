"""megatron-core seen from graftwork; importing this package makes megatron-core run on machines without CUDA.

Every module that touches megatron-core imports ``graftwork.compat`` first: megatron-core binds compiled functions
and autocast devices while it is being imported, so the accommodations must already be in place.
"""

from graftwork.compat import cpu

cpu.install()
