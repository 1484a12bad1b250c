"""Section 4.2: Inception and its batch-normalised variants."""
