"""Logits, token loops, caches and sampling: functions over any causal model that has what ``protocol`` lists.

Here belongs what reads a model without training it. No model class, no text but through the model's tokenizer.
"""
