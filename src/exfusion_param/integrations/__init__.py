"""What the trainers of other libraries need: `transformers` and `lightning`.

Each module imports its own library, so that neither needs the other's.
"""
