"""How a prior is learned: SWAG while training, the Fisher of a trained model, an isotropic one; recipes for whole runs."""
