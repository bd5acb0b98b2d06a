"""``lora-svd``: the command line, a thin layer over the package. Nothing imports it."""
