"""What repeats in a text, and can therefore be counted without a model."""
