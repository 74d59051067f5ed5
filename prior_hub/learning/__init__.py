"""How a prior is learned: SWAG while training, an isotropic one from a checkpoint."""
