"""The pipeline spec."""
