"""A few rows of review data with known lengths and answers."""

REVIEWS = [
    {"input": f"Review: the film number {i} was " + "very " * (i % 5) + "long.", "output": "good" if i % 3 else "bad"}
    for i in range(23)
]
