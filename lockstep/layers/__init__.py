"""Single-device modules built on the exact kernels."""
