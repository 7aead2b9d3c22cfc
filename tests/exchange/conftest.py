"""megatron-core must be imported through graftwork.compat, also by test modules that name megatron first."""

import graftwork.compat  # noqa: F401
