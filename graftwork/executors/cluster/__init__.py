"""What is known of a cluster: its profile, how code reaches it, and whether both work."""
