"""What the examples share; no part of the package."""
