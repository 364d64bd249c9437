"""The first-party model families, registered through the public hooks only."""
