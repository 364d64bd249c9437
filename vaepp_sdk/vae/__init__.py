"""Work plans, the protocols of strategies and adapters, and the drop-in autoencoder."""
