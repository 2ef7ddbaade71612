"""The optimizers of the zoo, and the factory that builds any of them by name."""
