"""What other libraries need; each module imports its own library."""
