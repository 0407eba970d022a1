"""AutoQ: per-layer mixed-precision quantization search, measured on the runtime you deploy to."""

__version__ = "0.1.0"
