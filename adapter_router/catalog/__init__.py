"""What adapters exist, and the private copies of their files. No torch."""
