"""What resumes."""
