"""The posterior downstream: samplers, samples on disk, their average, how good it is and whether it may be trusted."""
