"""Which compiler the tests take."""

import os

COMPILER = "inductor" if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else "aot_eager"
"""Inductor compiles C++ for many minutes in all, so only nightly tests take it for everything. What
it compiles are the same graphs, which "aot_eager" traces too, forward and backward."""
