"""Adapters out to and in from Hugging Face PEFT: the same function there and here, or a refusal that says why.

``places`` knows which Hugging Face module is which of our linears; ``low_rank``, ``scales`` and ``prompts`` turn a kind
of adapter into tensors.
"""
