"""Section 4.2: Inception and its variants, alone or many runs side by side."""
