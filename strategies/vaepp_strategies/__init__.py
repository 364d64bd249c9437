"""The first-party strategies, registered through the public hooks only."""
