"""Making a recipe and an executor fit each other, before anything starts."""
