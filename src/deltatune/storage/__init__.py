"""Adapter files in and out: PEFT's folder and keys, written whole or not at all, read strictly."""
