"""What only programs written for PEFT ask for: classes for `isinstance`, tables, small functions. See `as_peft`."""
