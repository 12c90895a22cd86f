"""The input seam: rows before the embedded tokens, which nobody outside of the model sees."""
