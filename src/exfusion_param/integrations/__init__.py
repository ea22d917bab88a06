"""Integrations with the trainers of other libraries: `transformers` and `lightning`.

Each module imports only its own library.
"""
