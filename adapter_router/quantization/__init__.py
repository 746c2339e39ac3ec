"""Bases whose weights take 2, 3, 4 or 8 bits each. Weight-only: what is multiplied is the dequantised weight."""
