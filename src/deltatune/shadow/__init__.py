"""ShadowPEFT: a small second transformer beside a frozen decoder (a method that acts on whole blocks)."""
