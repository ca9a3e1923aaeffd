"""Many conversions in one call: what is asked (`job`), one attempt at it (`attempt`), where, and what came of it."""
