"""How a prior is learned: SWAG while training, an isotropic one from a checkpoint.

The source task is whatever a `Trainer` trains: a supervised model, a masked language model, or without labels `SimCLR`,
`BarlowTwins` or an objective of your own (self_supervised.py says what one needs).
"""
