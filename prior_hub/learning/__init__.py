"""How a prior is learned: SWAG while training, the Fisher of a trained model, an isotropic one; recipes for whole runs.

The source task is whatever a `Trainer` trains: a supervised model, a masked language model, or without labels `SimCLR`,
`BarlowTwins` or an objective of your own (self_supervised.py says what one needs).
"""
