"""What a prior is: the Gaussian, its configuration, its files, and how its names meet a model's."""
