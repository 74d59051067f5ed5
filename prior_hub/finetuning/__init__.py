"""How a prior is used: the penalty, its place in Trainer, the arguments."""
