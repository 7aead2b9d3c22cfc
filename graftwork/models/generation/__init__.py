"""Logits, token loops, caches and sampling: functions over any causal model that has what ``protocol`` lists."""
