"""The workers of each role, and where they live."""
