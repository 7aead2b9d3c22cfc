"""What runs inside a launched process, and how it hears of the process that launched it."""
