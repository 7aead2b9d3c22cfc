"""How a launched task is: what it prints, what its scheduler says, how it ended, and how a stop reaches it."""
