"""How many training steps does a selection save? ``python -m benchmarks.quality.multiplier``."""
