"""Merges against PEFT where it is right, and against the formulas where it is not."""
